"""RUN/timeline.jsonl: what a run did by the clock: starts, phases before the first step, saves, evaluations, ends.

A row: {"time", "attempt", "step", "event"} and what belongs to the event; "seconds" is what training waited for it. A
save that is written in the background ends at a later step, with a `commit`.
metrics.jsonl says how the steps went, and a resume sets its later rows aside; this file only grows.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from amclip_ds import run_files
from amclip_ds.jsonl import append_line, read_lines

SHORTEST_S = 0.01  # a wait below this is not worth a row


def world_sizes(folder: Path) -> dict[int, int]:
    """Attempt of a run -> its number of ranks, of those that left a start."""
    rows = read_lines(folder / run_files.TIMELINE, run_files.EVENT | {"world_size": int}, run_files.MAX_METRICS)
    return {row["attempt"]: row["world_size"] for row in rows if row["event"] == "start"}


class Timeline:
    """A run's writer of these rows. On ranks other than 0 it writes nothing.

    began: when this attempt did, in seconds since the epoch; None: with its process.
    """

    def __init__(self, folder: Path, attempt: int, is_main: bool, began: float | None = None) -> None:
        self._began = psutil.Process().create_time() if began is None else began
        self._file, self._attempt, self._is_main = folder / run_files.TIMELINE, attempt, is_main
        self.step = 0
        self._start: dict[str, float] | None = {}  # part -> seconds, until the first step is over

    def start(self, **facts: Any) -> None:
        """The row of an attempt's start. before_s: since it began (imports, and the ranks' meeting)."""
        before_s = time.time() - self._began
        self._count("imports and meeting", before_s)
        self.add("start", before_s=round(before_s, 3), **facts)

    def first_step(self) -> str | None:
        """After the first step, once: how long its start took, by part."""
        if self._start is None:
            return None
        parts, self._start = self._start, None
        whole = time.time() - self._began
        parts["first step and the rest"] = whole - sum(parts.values())
        reported = ", ".join(
            f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in parts.items() if seconds >= 0.05
        )
        return f"start: {whole:.1f} s to the end of the first step ({reported})"

    def _count(self, part: str, seconds: float) -> None:
        if self._start is not None:
            self._start[part] = self._start.get(part, 0.0) + seconds

    def add(self, event: str, **facts: Any) -> None:
        """One row. Raises nothing: a row that the disk does not take is missing in the report, and only there."""
        if not self._is_main:
            return
        row = {"time": round(time.time(), 3), "attempt": self._attempt, "step": self.step, "event": event}
        with contextlib.suppress(OSError):
            append_line(self._file, row | facts)

    @contextlib.contextmanager
    def during(self, event: str, **facts: Any) -> Iterator[None]:
        """A row of what the block took, if it took any time."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = round(time.monotonic() - began, 3)
            self._count(event, seconds)
            if seconds >= SHORTEST_S:
                self.add(event, seconds=seconds, **facts)
