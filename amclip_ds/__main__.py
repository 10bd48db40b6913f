"""`amclip`, and `python -m amclip_ds`: the command, which a Ctrl-C ends quietly from its first moment on."""

import atexit
import os
import signal
import sys
from contextlib import suppress


def main() -> int:
    """Until there is a command that could answer it, Ctrl-C ends the process as the shell expects (code 130)."""
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as below nohup
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    codes: list[int] = []
    atexit.register(leave, codes)  # the first to be registered is the last to be called
    from amclip_ds import cli, completion

    if completion.is_asked():
        completion.answer()
    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    codes.append(cli.main())
    return codes[0]


def leave(codes: list[int]) -> None:
    """Ends the process with the command's code, if it came to one. Everything is written and every thread joined by
    now; taking torch and DeepSpeed down module by module costs a second more of each process, and restarts wait."""
    if codes:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, full, or none: nothing more can be said
                stream.flush()
        os._exit(codes[0])


if __name__ == "__main__":
    sys.exit(main())
