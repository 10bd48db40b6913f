"""A progress bar in a terminal; elsewhere a line now and then, so that a log shows that something happens."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from amclip_ds import display

REPORT_EVERY_S = 30.0


@contextmanager
def progress(what: str, total: int, say: Callable[[str], None] = print) -> Iterator[Callable[..., None]]:
    """Yields a function to call for each of `total` things done, or with the number of those done since."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=display.console()) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count=1: bar.advance(task, count)
        return
    began = reported = time.monotonic()
    done = 0

    def advance(count: int = 1) -> None:
        nonlocal done, reported
        done += count
        now = time.monotonic()
        if now - reported > REPORT_EVERY_S and done < total:
            reported = now
            left = display.duration((now - began) / done * (total - done))
            say(f"{what}: {done} of {total}, about {left} left")

    yield advance
