"""A resumed run equals an uninterrupted one: 40 steps against 13 + 27, every bit, on real engines."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases_checkpoint import GLOBAL_BATCH, TOTAL
from tests.harness import run_ranks

CASE = "tests.distributed.cases_checkpoint:run"
CUT = 13
EVERY_DAY = ("zero3_fp32.json", 1, "random")
MATRIX = [
    (f"zero{stage}_{dtype}.json", accumulation, strategy)
    for stage, dtype, accumulation, strategy in itertools.product(
        (1, 2, 3), ("fp32", "bf16"), (1, 2), ("random", "attentive")
    )
]
OTHER_OPTIMIZERS = [
    (f"zero{stage}_{dtype}.json", optim)
    for stage, dtype, optim in itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("muon", "lion"))
    if stage or dtype == "fp32"
]


def launch(folder: Path, steps: int, world_size: int = 2, **settings: Any) -> list[dict[str, Any]]:
    return run_ranks(CASE, world_size, timeout_s=400, folder=str(folder), steps=steps, **settings)


def settings_of(ds: str, accumulation: int, strategy: str, world_size: int = 2) -> dict[str, Any]:
    return {"ds": ds, "micro": GLOBAL_BATCH // world_size // accumulation, "strategy": strategy}


def check_exact(folder: Path, ds: str, accumulation: int, strategy: str) -> None:
    settings = settings_of(ds, accumulation, strategy)
    whole = launch(folder / "unused", TOTAL, save=False, **settings)
    first = launch(folder, CUT, **settings)
    rest = launch(folder, TOTAL - CUT, resume=True, save=False, **settings)
    for rank in range(2):
        assert first[rank]["rows"] + rest[rank]["rows"] == whole[rank]["rows"]
        assert rest[rank]["loaded"] == first[rank]["digest"]
        assert rest[rank]["digest"] == whole[rank]["digest"]
        assert rest[rank]["random"] == whole[rank]["random"]
    assert len({row[0] for row in whole[0]["rows"]}) == TOTAL, "the losses differ from step to step"
    assert whole[0]["groups"] > 2, "several parameter groups"


def test_13_and_27_steps_are_40(tmp_path: Path) -> None:
    check_exact(tmp_path, "zero2_bf16.json", 2, "attentive")


@pytest.mark.parametrize(
    "ds, accumulation, strategy",
    [pytest.param(*cell, marks=() if cell == EVERY_DAY else pytest.mark.nightly) for cell in MATRIX],
)
def test_13_and_27_steps_are_40_everywhere(ds: str, accumulation: int, strategy: str, tmp_path: Path) -> None:
    """The run that saves after 13 steps continues to 40 itself: that a save disturbs nothing is shown above."""
    check_continued(tmp_path, settings_of(ds, accumulation, strategy))


@pytest.mark.nightly
@pytest.mark.parametrize("ds, optim", OTHER_OPTIMIZERS)
def test_13_and_27_steps_are_40_with_other_optimizers(ds: str, optim: str, tmp_path: Path) -> None:
    check_continued(tmp_path, settings_of(ds, 2, "random") | {"optim": optim})


def check_continued(folder: Path, settings: dict[str, Any]) -> None:
    whole = launch(folder, CUT, go_on=TOTAL - CUT, **settings)
    rest = launch(folder, TOTAL - CUT, resume=True, save=False, **settings)
    for rank in range(2):
        assert rest[rank]["rows"] == whole[rank]["rows"][CUT:]
        assert rest[rank]["loaded"] == whole[rank]["digest"]
        assert rest[rank]["final"] == whole[rank]["final"]


def test_what_a_load_forgets_is_seen(tmp_path: Path) -> None:
    """The twins: a load that leaves one part of the state out is caught by what follows. Muon has every part: its
    own momentum, of whole matrices, and adamw's of all else."""
    settings = settings_of("zero2_fp32.json", 1, "attentive") | {"optim": "muon"}
    first = launch(tmp_path, 3, go_on=2, **settings)[0]
    going_on = first["rows"][3:]
    right = launch(tmp_path, 2, resume=True, save=False, **settings)[0]
    assert right["rows"] == going_on
    for forgotten in ("master", "exp_avg_sq", "momentum_buffer", "ema", "counters"):
        broken = launch(tmp_path, 2, resume=True, save=False, forget=(forgotten,), **settings)[0]
        assert broken["rows"] != going_on and broken["loaded"] != first["digest"], forgotten
    broken = launch(tmp_path, 2, resume=True, save=False, forget=("buffers",), **settings)[0]
    assert broken["loaded"] != first["digest"], "running statistics change no loss, but belong to the state"
