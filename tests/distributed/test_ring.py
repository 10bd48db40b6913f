"""The image-text losses on a ring of real ranks: as gathered, alone and in the training step."""

import pytest

from tests.harness import run_ranks

EIGHT = [pytest.param(8, chunk, marks=pytest.mark.nightly) for chunk in (0, 2, 3)]
NIGHTLY = [pytest.param(f"zero{stage}_fp32.json", marks=pytest.mark.nightly) for stage in (1, 2)]


@pytest.mark.parametrize(("world_size", "chunk"), [(1, 0), (2, 2), (3, 0), (4, 3), *EIGHT])
def test_values_and_gradients_are_those_of_gathering(world_size: int, chunk: int) -> None:
    """5 samples a rank in tiles of 5, 2 or 3 rows; NT-Xent is fp32 through its normalisation."""
    case = "tests.distributed.cases_ring:against_gather"
    for found in run_ranks(case, world_size=world_size, timeout_s=600, chunk=chunk):
        assert found["softmax"] < 1e-12 and found["sigmoid"] < 1e-12 and found["nt_xent"] < 1e-5, found


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "nt_xent"])
def test_a_wrong_tile_is_seen_on_8_ranks(kind: str) -> None:
    """The twin: one rank hands on what it had before."""
    case = "tests.distributed.cases_ring:against_gather"
    found = run_ranks(case, world_size=8, timeout_s=600, chunk=3, wrong=True)
    assert max(one[kind] for one in found) > 1e-3


@pytest.mark.parametrize("ds", [*NIGHTLY, "zero3_fp32.json"])
def test_a_run_with_teacher_and_grad_cache_is_the_same(ds: str) -> None:
    check_a_run(ds, world_size=2, batch_size=8)


@pytest.mark.nightly
@pytest.mark.parametrize("ds", [*NIGHTLY, "zero3_fp32.json"])
def test_a_run_on_8_ranks_is_the_same(ds: str) -> None:
    check_a_run(ds, world_size=8, batch_size=32)


def check_a_run(ds: str, world_size: int, batch_size: int) -> None:
    """Two views, teacher, GradCache of two pieces, chunks that no piece divides by; sigmoid too. Twin: kinds differ."""
    variants = [
        {"accumulation": 2, "batch_size": batch_size, "loss": {"kind": kind, "exchange": exchange, "chunk": 3}}
        for kind in ("softmax", "sigmoid")
        for exchange in ("gather", "ring")
    ]
    case = "tests.distributed.cases:train_all"
    found = run_ranks(case, world_size=world_size, timeout_s=900, ds=ds, variants=variants)[0]
    losses = [variant["losses"] for variant in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[3] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)
