"""What workers need, imported once by the server process that they are forked from (workers.start_worker_server)."""

import simplejpeg  # noqa: F401

import amclip_ds.data.chunks  # noqa: F401
from amclip_ds.data.captions import build_tokenizer

build_tokenizer()  # reads its table of words once for all
