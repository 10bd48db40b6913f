"""What the end-to-end tests run on forked ranks: a command as a user types it, with what it printed."""

import contextlib
import io

from amclip_ds.cli import main


def command(argv: list[str]) -> tuple[int, str]:
    """Runs `amclip ARGV` in this process. Returns the exit code and everything it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(argv)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
    return code, printed.getvalue()
