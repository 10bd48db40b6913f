"""`amclip`, and `python -m amclip_ds`: the command, which a Ctrl-C ends quietly from its first moment on."""

import signal
import sys


def main() -> int:
    """Until there is a command that could answer it, Ctrl-C ends the process as the shell expects (code 130)."""
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as below nohup
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from amclip_ds import cli, completion

    if completion.is_asked():
        completion.answer()
    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
