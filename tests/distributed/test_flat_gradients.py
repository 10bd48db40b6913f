"""Flat gradients at ZeRO 1 are the fp32 mean of the ranks' own, in rounds of a small bucket; the steps are the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.engine.ds_config import DS_CONFIGS
from tests.harness import run_ranks

CELLS = [("fp32", 1), ("bf16", 1), ("bf16", 3)]
CASE = "tests.distributed.cases_engine:flat_gradients"


def run(tmp_path: Path, precision: str, world_size: int, misplaced: int = 0) -> dict[str, Any]:
    """On a bucket so small that a group takes several rounds."""
    ds = json.loads((DS_CONFIGS / f"zero1_{precision}.json").read_text())
    ds["zero_optimization"]["reduce_bucket_size"] = 10_000
    file = tmp_path / f"zero1_{precision}.json"
    file.write_text(json.dumps(ds))
    return run_ranks(CASE, world_size=world_size, timeout_s=300, ds=str(file), misplaced=misplaced)[0]


@pytest.mark.parametrize(
    ("precision", "world_size"),
    [
        ("fp32", 2),
        *(pytest.param(*cell, marks=pytest.mark.nightly) for cell in (("fp32", 1), ("bf16", 1), ("bf16", 3))),
    ],
)
def test_the_mean_of_the_ranks(tmp_path: Path, precision: str, world_size: int) -> None:
    found = run(tmp_path, precision, world_size)
    assert found["error"] < 1e-6 and found["unused"] == 0 and not found["left"]
    assert (found["rounds"] > 3) == (world_size > 1)
    if precision == "fp32" or world_size == 1:  # else DeepSpeed rounds the mean to bf16, and the runs part
        for own, theirs in zip(found["flat"], found["plain"], strict=True):
            assert own == pytest.approx(theirs, rel=1e-5)


@pytest.mark.nightly
def test_a_misplaced_piece_is_seen(tmp_path: Path) -> None:
    """The twin."""
    assert run(tmp_path, "fp32", 2, misplaced=1)["error"] > 1e-3
