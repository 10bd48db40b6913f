"""Real ranks, real ZeRO: an evaluation gives the same rows on any number of ranks, at any stage, uneven ends too."""

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.unit.evaluate.test_encoder import write_set

CASE = "tests.distributed.cases_evaluate:evaluate"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images: 6 batches of 4, which neither 2 nor 4 ranks divide evenly into full ones."""
    return write_set(tmp_path_factory.mktemp("uneven") / "set")


@pytest.fixture(scope="module")
def alone(uneven: Path) -> list[dict]:
    return run_ranks(CASE, world_size=1, ds="zero2_fp32.json", data=str(uneven), timeout_s=400)[0]


@pytest.mark.parametrize(
    ("world_size", "ds"),
    [
        (2, "zero3_fp32.json"),
        (4, "zero3_fp32.json"),
        pytest.param(2, "zero0_fp32.json", marks=pytest.mark.nightly),
        pytest.param(3, "zero1_fp32.json", marks=pytest.mark.nightly),
        pytest.param(4, "zero2_fp32.json", marks=pytest.mark.nightly),
    ],
)
def test_ranks_agree_with_one(world_size: int, ds: str, uneven: Path, alone: list[dict]) -> None:
    results = run_ranks(CASE, world_size=world_size, ds=ds, data=str(uneven), timeout_s=400)
    assert all(rows == alone for rows in results)
    assert [row["weights"] for row in alone] == ["student", "teacher"]
    assert all(row["num_samples"] == 21 and row["step"] == 3 for row in alone)


def test_slices_that_double_samples_are_seen(uneven: Path, alone: list[dict]) -> None:
    """The twin: a sampler that pads its ends judges other images."""
    results = run_ranks(CASE, world_size=2, ds="zero2_fp32.json", data=str(uneven), slices=True, timeout_s=400)
    assert results[0][0]["metrics"] != alone[0]["metrics"]
