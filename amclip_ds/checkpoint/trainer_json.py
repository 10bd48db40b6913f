"""What trainer.json and rng/*.json of a checkpoint hold, checked value by value before anything of a run is touched.

A well-hashed file may still be forged, or of another program: a field that is missing, of another type or out of its
range makes the checkpoint a damaged one, so that an older one is considered as for any other damage.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amclip_ds.checkpoint.tensorfile import DamagedError

MAX_COUNT = 10**18
MAX_WINDOW = 10**6
Check = Callable[[Any], bool]


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_COUNT and math.isfinite(value)


def is_list_of(check: Check, longest: int) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= longest and all(map(check, value))


def is_map_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


GUARDS: dict[str, Check] = {
    "window": is_list_of(is_finite, MAX_WINDOW),
    "skipped_in_a_row": is_count,
    "skipped": is_count,
    "rewinds": is_count,
}
CURSOR: dict[str, Check] = {"epoch": is_count, "step": is_count}
RUN: dict[str, Check] = {
    "step": is_count,
    "updates": is_count,
    "samples_seen": is_count,
    "epoch": is_count,
    "cursor": lambda value: value is None or _first_wrong(value, CURSOR) is None,
    "guards": lambda value: _first_wrong(value, GUARDS) is None,
}
RANDOM: dict[str, Check] = {
    "python": lambda value: isinstance(value, list) and len(value) == 3 and is_list_of(is_count, 1000)(value[1]),
    "numpy": lambda value: isinstance(value, list) and len(value) == 5 and is_list_of(is_count, 1000)(value[1]),
    "torch": lambda value: isinstance(value, str) and len(value) < 1 << 20,
}


def check_trainer(path: Path, content: dict[str, Any], step: int) -> dict[str, Any]:
    """The content, whole and of the manifest's step. Raises DamagedError, naming the field."""
    wrong = _first_wrong(content.get("run"), RUN)
    if wrong is not None:
        raise DamagedError(f"{path}: run.{wrong} is missing or not what a run saves")
    if not is_map_of(lambda value: is_finite(value) and value >= 0)(content.get("optimizer")):
        raise DamagedError(f"{path}: optimizer is missing or not what a run saves")
    if not is_map_of(is_count)(content.get("batch", {})):
        raise DamagedError(f"{path}: batch is not what a run saves")
    run = content["run"]
    if run["step"] != step:
        raise DamagedError(f"{path}: run.step is {run['step']}, the manifest's {step}")
    if run["updates"] > step:
        raise DamagedError(f"{path}: run.updates is {run['updates']} after {step} steps")
    return content


def check_random(path: Path, content: dict[str, Any]) -> None:
    """Raises DamagedError where the file cannot be a rank's generators."""
    wrong = _first_wrong(content, RANDOM)
    if wrong is not None:
        raise DamagedError(f"{path}: {wrong} is missing or no state of a generator")


def _first_wrong(value: Any, checks: dict[str, Check]) -> str | None:
    """The first field that is missing or unfit; None where all are as they should be."""
    if not isinstance(value, dict):
        return next(iter(checks))
    return next((name for name, check in checks.items() if name not in value or not check(value[name])), None)
