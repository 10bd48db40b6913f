"""What a run's folder says, as plain values: numbers by step, attempts, incidents, evaluations, settings."""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any, TypeGuard

from amclip_ds import jsonl, plain_yaml, run_files
from amclip_ds.errors import UserError
from amclip_ds.files import not_read, read_json
from amclip_ds.record import read_verdict
from amclip_ds.report.incidents import Incidents, each_once

COUNTED = ("updates", "samples_seen", "attempt", "epoch", "time")  # numbers of a metrics row that are no measurement
ALIVE_S = 180.0  # a run that wrote something so lately is still at work
LARGEST = 1e100  # of what can be measured; twice a larger number may be infinite
TAIL = 1 << 16  # bytes of out.log's end that are searched


@dataclass
class Series:
    """Numbers by step; a column has NaN where a row has no number."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    columns: "dict[str, array[float]]" = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Takes a row's numbers over, `step` apart."""
        self.steps.append(row["step"])
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                if name not in self.columns:
                    self.columns[name] = array("d", [nan]) * (len(self.steps) - 1)
                self.columns[name].append(value if abs(value) < LARGEST else nan)
        for column in self.columns.values():
            if len(column) < len(self.steps):
                column.append(nan)

    def get(self, name: str) -> "array[float]":
        """A column; all NaN where no row has it."""
        return self.columns.get(name) or array("d", [nan]) * len(self.steps)


@dataclass
class RunFacts:
    """One run as its folder describes it. Everything in it is somebody else's text until it is escaped."""

    folder: Path
    name: str
    verdict: dict[str, Any] | None
    """exit.json"""
    is_alive: bool
    """without a verdict: whether something was written lately"""
    last_write: float | None
    config: dict[str, Any]
    """dotted key -> value"""
    versions: dict[str, Any]
    plan: dict[str, Any]
    """plan.json: memory predicted and measured"""
    starts: list[dict[str, Any]]
    """attempts.jsonl"""
    timeline: list[dict[str, Any]]
    metrics: Series
    set_aside: Series
    """metrics of steps that were made again after a resume"""
    evaluations: list[dict[str, Any]]
    """by step, also where an older checkpoint was evaluated later"""
    classes: list[dict[str, Any]]
    """of the last step that each set was evaluated at"""
    incidents: Incidents
    summary: str
    """what the run said last about its data"""
    unreadable: dict[str, int]
    """file -> lines of it that could not be read"""

    @property
    def total_steps(self) -> int | None:
        """How long the run is to be, where its settings say it in steps."""
        steps = self.config.get("run.steps")
        return steps if is_measured(steps) and type(steps) is int else None

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        return max(int(number_in(self.verdict, "step")), self.metrics.steps[-1] if self.metrics.steps else 0)


def read_run(folder: Path) -> RunFacts:
    """Everything but the pictures. Raises UserError where the folder is no run's."""
    run_files.check_is_run(folder)
    unreadable: dict[str, int] = {}

    def rows(name: str, fields: dict[str, type]) -> Iterator[dict[str, Any]]:
        return _rows(folder / name, fields, unreadable)

    metrics, set_aside = Series(), Series()
    for row in rows(run_files.METRICS, run_files.STEP):
        metrics.add(row)
    for row in rows(jsonl.superseded(run_files.METRICS), run_files.STEP):
        set_aside.add(row)
    incidents = Incidents()
    for row in each_once(rows(run_files.INCIDENTS, run_files.INCIDENT)):
        incidents.add(row)
    verdict, last_write = read_verdict(folder), _last_write(folder)
    return RunFacts(
        folder=folder,
        name=folder.resolve().name,
        verdict=verdict,
        is_alive=verdict is None
        and last_write is not None
        and time.time() - last_write < ALIVE_S
        and not _is_released(folder / run_files.OWNER),
        last_write=last_write,
        config=plain_yaml.flat(plain_yaml.read(folder / run_files.CONFIG)),
        versions=_read_object(folder / run_files.VERSIONS),
        plan=_read_object(folder / run_files.PLAN),
        starts=list(rows(run_files.ATTEMPTS, {"attempt": int})),
        timeline=list(rows(run_files.TIMELINE, run_files.EVENT)),
        metrics=metrics,
        set_aside=set_aside,
        evaluations=sorted(rows(run_files.EVALUATIONS, run_files.EVALUATION), key=lambda row: row["step"]),
        classes=_latest(rows(run_files.CLASSES, run_files.OF_CLASSES)),
        incidents=incidents,
        summary=_summary(folder / run_files.LOG),
        unreadable=unreadable,
    )


def _rows(path: Path, fields: dict[str, type], unreadable: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The rows of a file, one at a time; a file that is too large or unreadable ends where it does, and is counted."""
    size = 0
    try:
        for line, is_whole in jsonl.lines(path):
            size += len(line)
            row = jsonl.parse(line, fields) if is_whole and size <= run_files.MAX_METRICS else None
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                unreadable[path.name] = unreadable.get(path.name, 0) + 1
    except OSError as error:
        raise not_read(str(path), error) from None


def _latest(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the last step of each data set, weights and task: a long run has too many to hold."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["dataset"], row["weights"], row["task"]
        if key not in found or row["step"] >= found[key]["step"]:
            found[key] = row
    return list(found.values())


def number_in(row: dict[str, Any] | None, name: str) -> float:
    """A number of a row, such as its time or seconds; 0 where it has none."""
    value = (row or {}).get(name)
    return float(value) if is_measured(value) else 0.0


def is_measured(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that something may have measured."""
    return jsonl.is_number(value) and abs(value) < LARGEST


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict)
    except UserError:
        return {}


def _is_released(owner: Path) -> bool:
    """Whether the last trainer of the folder has let go of it."""
    try:
        return read_json(owner, dict).get("released") is True
    except UserError:
        return False


def _last_write(folder: Path) -> float | None:
    times = []
    for name in (run_files.METRICS, run_files.OWNER, run_files.LOG, run_files.TIMELINE):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _summary(log: Path) -> str:
    """The last line of out.log that accounts for the samples; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read(TAIL).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line[20:] for line in reversed(lines) if line[20:].startswith("data: ") and "trained on" in line), "")
