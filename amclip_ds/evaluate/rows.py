"""The rows of RUN/eval.jsonl: which are missing, and which are appended. One row a step, weights, data set and task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amclip_ds import run_files
from amclip_ds.errors import AmclipError
from amclip_ds.evaluate.datasets import EvalSet
from amclip_ds.jsonl import read_lines
from amclip_ds.record import evaluation_lines
from amclip_ds.record.backlog import Backlog

KEY = ("step", "weights", "dataset", "task")  # what two rows may not share


def new(run: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose step, weights, data set and task are not yet in RUN/eval.jsonl; of equals among them the first."""
    present, found = _present(run), []
    for row in rows:
        key = _key(row)
        if key not in present:
            present.add(key)
            found.append(row)
    return found


def of_step(run: Path, step: int) -> set[tuple[Any, ...]]:
    """(weights, data set, task) of the rows that RUN/eval.jsonl has of a step."""
    return {key[1:] for key in _present(run) if key[0] == step}


def append_new(run: Path, rows: Sequence[dict[str, Any]]) -> int:
    """Appends the new ones of the rows. Returns how many. Raises AmclipError where the disk does not take them."""
    found = new(run, rows)
    backlog = Backlog(lambda cause, outcome: None)
    for name, lines in evaluation_lines(found).items():
        backlog.append(run / name, lines)
    if not backlog.close():
        raise AmclipError(f"{run}/eval.jsonl cannot be written: the rows of this evaluation are not in it")
    return len(found)


def rename(row: dict[str, Any], how: str) -> None:
    """Puts what was not as usual into the name of a row's set: whoever reads rows takes it for another set's,
    so none is taken for a usual one."""
    for name in ("dataset", "suite_dataset"):
        if name in row:
            row[name] += f" {how}"


def mark_asked(rows: Sequence[dict[str, Any]]) -> None:
    """Names the templates, class names or split that an option gave, where the set has others of its own."""
    for row in rows:
        for option in ("templates", "classnames", "split"):
            if option in row:
                rename(row, f"{option}={row[option]}")


def missing(run: Path, step: int, sets: Sequence[EvalSet], weights: Sequence[str]) -> dict[str, list[EvalSet]]:
    """Weights -> the sets of which RUN/eval.jsonl has no row at this step. Empty: nothing is missing."""
    present = _present(run)
    left = {name: [data for data in sets if (step, name, data.name, data.task) not in present] for name in weights}
    return {name: some for name, some in left.items() if some}


def _present(run: Path) -> set[tuple[Any, ...]]:
    return {_key(row) for row in read_lines(run / run_files.EVALUATIONS, run_files.EVALUATION)}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
