"""Where a run's time went, by attempt: start, steps (data, communication, computing), saves, evaluations, pictures, the
rest.

A metrics row is the mean over the steps since the row before it in its attempt, so steps x seconds adds up to the time
of the steps. Saves, evaluations and pictures are no part of it; timeline.jsonl has them.
"""

from dataclasses import dataclass, field
from math import isnan
from typing import Any, NamedTuple

from amclip_ds.report.read import RunFacts, number_in

PARTS = {
    "compute": "computing",
    "communication": "communication between ranks",
    "data": "waiting for data",
    "again": "steps that had to be made again",
    "start": "starting: imports, index, engines, resume",
    "save": "waiting for checkpoints",
    "evaluate": "evaluations",
    "pictures": "pictures of the masks",
    "other": "not accounted for",
    "between": "between attempts: queue, or nobody",
}
WAITS = {"save": "save", "commit": "save", "evaluate": "evaluate", "pictures": "pictures"}
"""event of timeline.jsonl for which no step is made -> part"""


@dataclass
class Attempt:
    """One start of the run, until its end."""

    number: int
    began: float
    """seconds since the epoch: of the process"""
    ended: float
    seconds: dict[str, float] = field(default_factory=dict)
    """part -> seconds"""
    first_step: int = 0
    """the step it continued from"""
    last_step: int = 0
    world_size: int | None = None
    code: int | None = None
    """how it ended; None: it left no word"""
    reason: str = ""

    @property
    def wall_s(self) -> float:
        return max(0.0, self.ended - self.began)


class _Row(NamedTuple):
    """A logged step."""

    step: int
    is_again: bool
    """whether a resume set it aside, so that it was made again"""
    step_s: float
    data_s: float
    communication_s: float
    time: float


def attempts_of(run: RunFacts) -> list[Attempt]:
    """Every attempt that left a trace, in order."""
    steps = _rows_by_attempt(run)
    numbers = {row["attempt"] for row in [*run.starts, *run.timeline]}
    found = [_attempt(run, number, steps.get(number, [])) for number in sorted(numbers)]
    return [attempt for attempt in found if attempt is not None]


def total(attempts: list[Attempt]) -> dict[str, float]:
    """Part -> seconds over the whole run, the time between attempts with it."""
    sums = dict.fromkeys(PARTS, 0.0)
    for attempt in attempts:
        for part, seconds in attempt.seconds.items():
            sums[part] += seconds
    sums["between"] = sum(max(0.0, later.began - before.ended) for before, later in zip(attempts, attempts[1:]))
    return sums


def goodput(sums: dict[str, float]) -> float | None:
    """Share of the time from the first start to the last end in which steps that count were computed, communication
    with it; None where no time is known."""
    whole = sum(sums.values())
    return (sums["compute"] + sums["communication"]) / whole if whole > 0 else None


def _attempt(run: RunFacts, number: int, steps: list[_Row]) -> Attempt | None:
    rows = [row for row in run.timeline if row["attempt"] == number]
    start = next((row for row in rows if row["event"] == "start"), None)
    counted = next((row for row in run.starts if row["attempt"] == number and "time" in row), None)
    began = _time(start) - number_in(start, "before_s") if start else _time(counted) if counted else None
    if began is None:
        return None
    resumed = next((row["step"] for row in rows if row["event"] == "resumed"), 0)
    end = next((row for row in reversed(rows) if row["event"] == "end"), None)
    times = [logged.time for logged in steps] + [_time(row) for row in rows]
    attempt = Attempt(
        number,
        began,
        max([began, *([_time(end)] if end else times)]),
        first_step=resumed,
        last_step=max([resumed, *(logged.step for logged in steps), *(row["step"] for row in rows)]),
        world_size=_whole(start, "world_size"),
        code=_whole(end, "code"),
        reason=str((end or {}).get("reason", "")),
    )
    seconds, before = dict.fromkeys(PARTS, 0.0), resumed
    for logged in steps:
        count, before = max(0, logged.step - before), logged.step
        if logged.is_again:
            seconds["again"] += count * logged.step_s
            continue
        seconds["data"] += count * logged.data_s
        seconds["communication"] += count * logged.communication_s
        seconds["compute"] += count * max(0.0, logged.step_s - logged.data_s - logged.communication_s)
    for row in rows:
        if part := WAITS.get(row["event"]):
            seconds[part] += number_in(row, "seconds")
    training = next((place for place, row in enumerate(rows) if row["event"] == "training"), None)
    if start or training is not None:
        until = _time(rows[training]) if training is not None else attempt.ended  # it never came to training
        waits = sum(number_in(row, "seconds") for row in rows[:training] if row["event"] in WAITS)
        seconds["start"] = max(0.0, until - began - waits)  # a made-up evaluation is none of it
    seconds["other"] = max(0.0, attempt.wall_s - sum(seconds.values()))
    attempt.seconds = seconds
    return attempt


def _rows_by_attempt(run: RunFacts) -> dict[int, list[_Row]]:
    """Attempt -> its logged steps in their order."""
    found: dict[int, list[_Row]] = {}
    for series, is_again in ((run.metrics, False), (run.set_aside, True)):
        columns = [series.get(name) for name in ("attempt", "step_s", "data_wait_s", "communication_s", "time")]
        for step, attempt, *numbers in zip(series.steps, *columns):
            if not isnan(attempt):
                held = found.setdefault(int(attempt), [])
                held.append(_Row(step, is_again, *(0.0 if isnan(value) else value for value in numbers)))
    for rows in found.values():
        rows.sort()
    return found


def _time(row: dict[str, Any] | None) -> float:
    return number_in(row, "time")


def _whole(row: dict[str, Any] | None, name: str) -> int | None:
    value = (row or {}).get(name)
    return value if type(value) is int else None
