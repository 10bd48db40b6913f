"""Standard output and error that cannot end the work: closed, on a full disk, a pipe that nobody reads any more.

    @kept_from_ending_the_work
    def main(argv): ...

What cannot be written is lost, and the work continues. At the end one line on standard error says so, with code 1 where
all was well otherwise: the output of a command is its work. Of `train` it is not: that is in the run's folder.
"""

import contextlib
import errno
import functools
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from amclip_ds import display
from amclip_ds.errors import FAULT

RECORDED_ELSEWHERE = ("train", "watch", "demo")  # commands whose work is in files
NOBODY_READS = (errno.EPIPE, errno.EIO)  # `| head` has seen enough; the terminal is gone


def kept_from_ending_the_work(main: Callable[..., int]) -> Callable[..., int]:
    """A `main(argv)` whose process outlasts its output."""

    @functools.wraps(main)
    def kept(argv: Sequence[str] | None = None) -> int:
        make_steady()
        command = next(iter(sys.argv[1:] if argv is None else argv), "")
        try:
            code = main(argv)
        except SystemExit as leaving:
            leaving.code = _final(command, leaving.code or 0)
            raise
        return _final(command, code)

    return kept


def make_steady() -> None:
    """Puts the interpreter's own streams on descriptors that never fail. Others' in their place are left alone."""
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        _occupy(descriptor)
        stream = getattr(sys, name)
        if name != "stdin" and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _steady(stream, descriptor))


def _occupy(descriptor: int) -> None:
    """Where a standard descriptor is closed, the null device, so that no other file gets its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor, inheritable=True)
            os.close(null)
        else:
            os.set_inheritable(null, True)


def _steady(stream: TextIO | None, descriptor: int) -> TextIO:
    is_terminal = stream is not None and stream.isatty()
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return display.Screen(
        io.BufferedWriter(_SteadyFile(descriptor)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=is_terminal or descriptor == 2,
    )


class _SteadyFile(io.FileIO):
    """A descriptor that takes everything; `failure` is the first error that something was lost by."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # somebody set the terminal to never wait
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = self.failure or error
            return len(data)


def _final(command: str, code: Any) -> Any:
    """The exit code, once all is written that can be."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _SteadyFile):
        return code
    sys.stdout.flush()
    if raw.failure is None or raw.failure.errno in NOBODY_READS:
        return code
    print(f"amclip {command}: standard output cannot be written: {raw.failure.strerror}", file=sys.stderr)
    return FAULT if code == 0 and command not in RECORDED_ELSEWHERE else code
