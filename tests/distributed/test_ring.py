"""The image-text losses on a ring of real ranks: as gathered, alone and in the training step."""

import pytest

from tests.harness import run_ranks


@pytest.mark.parametrize(("world_size", "chunk"), [(1, 0), (2, 2), (3, 0), (4, 3)])
def test_values_and_gradients_are_those_of_gathering(world_size: int, chunk: int) -> None:
    for found in run_ranks("tests.distributed.cases_ring:against_gather", world_size=world_size, chunk=chunk):
        assert found["softmax"] < 1e-12 and found["sigmoid"] < 1e-12, found


@pytest.mark.parametrize(
    "ds",
    [
        pytest.param("zero1_fp32.json", marks=pytest.mark.nightly),
        pytest.param("zero2_fp32.json", marks=pytest.mark.nightly),
        "zero3_fp32.json",
    ],
)
def test_a_run_with_teacher_and_grad_cache_is_the_same(ds: str) -> None:
    """Two views, all four objectives' kinds, pieces of 2 samples; sigmoid too. Twin: the kinds differ."""
    variants = [
        {"accumulation": 2, "loss": {"kind": kind, "exchange": exchange, "chunk": 3}}
        for kind in ("softmax", "sigmoid")
        for exchange in ("gather", "ring")
    ]
    case = "tests.distributed.cases:train_all"
    losses = [found["losses"] for found in run_ranks(case, world_size=2, timeout_s=400, ds=ds, variants=variants)[0]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[3] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-2)
