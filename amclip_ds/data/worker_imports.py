"""What workers need, imported once by the server process that they are forked from (workers.start_worker_server)."""

import open_clip.tokenizer  # noqa: F401
import simplejpeg  # noqa: F401

import amclip_ds.data.chunks  # noqa: F401
