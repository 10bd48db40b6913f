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
    return run_ranks(CASE, world_size=1, ds="zero2_fp32.json", data=str(uneven), timeout_s=400)[0][0]


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
    assert all(found == (alone, [], None) for found in results)
    assert [row["weights"] for row in alone] == ["student", "teacher"]
    assert all(row["num_samples"] == 21 and row["step"] == 3 for row in alone)


def test_slices_that_double_samples_are_seen(uneven: Path, alone: list[dict]) -> None:
    """The twin: a sampler that pads its ends judges other images."""
    results = run_ranks(CASE, world_size=2, ds="zero2_fp32.json", data=str(uneven), slices=True, timeout_s=400)
    assert results[0][0][0]["metrics"] != alone[0]["metrics"]


def test_a_set_that_one_rank_cannot_read_costs_its_own_rows_alone(
    uneven: Path, alone: list[dict], tmp_path: Path
) -> None:
    broken = write_set(tmp_path / "broken")
    tar = broken / "test" / "0.tar"
    content = bytearray(tar.read_bytes())
    at = content.index(b"\x89PNG")
    content[at : at + 64] = bytes(64)  # the first image: in rank 0's part alone
    tar.write_bytes(content)
    specs = f"{broken}::{tmp_path / 'none'}::{uneven}"
    for rows, failures, _ in run_ranks(CASE, ds="zero3_fp32.json", data=specs, timeout_s=400):
        assert rows == alone
        assert [failure.split(":")[0] for failure in failures] == [str(broken), str(tmp_path / "none")]
        assert "0.tar" in failures[0] and "cannot be read" in failures[0]


def test_a_stop_keeps_the_rows_that_are_whole(uneven: Path, alone: list[dict]) -> None:
    """Asked before the set and each batch: 1 + 2 of prompts, 3 of images; the seventh is before the teacher's first."""
    for stop_at, whole in ((1, 0), (5, 0), (9, 1)):
        results = run_ranks(CASE, ds="zero3_fp32.json", data=str(uneven), stop_at=stop_at, timeout_s=400)
        assert results == [(alone[:whole], [], "asked")] * 2


def test_rows_that_are_there_are_not_made_again(uneven: Path, alone: list[dict]) -> None:
    there = [tuple(row[name] for name in ("weights", "dataset", "task")) for row in alone[:1]]
    results = run_ranks(CASE, ds="zero3_fp32.json", data=str(uneven), recorded=there, timeout_s=400)
    assert results == [(alone[1:], [], None)] * 2


def test_a_failure_of_any_kind_on_one_rank_is_raised_on_all() -> None:
    """Not an AmclipError alone: the others used to wait in a broadcast for what rank 0 never sent."""
    first, second = run_ranks("tests.distributed.cases_evaluate:failing_on_one_rank", timeout_s=60)
    full = "OSError: [Errno 28] No space left on device"
    assert first == [full, "UserError: run.out: no", "AmclipError: rank 1: ValueError: odd", "done"]
    assert second == [f"AmclipError: rank 0: {full}", *first[1:]]
