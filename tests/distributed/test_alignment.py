"""Weights are where a GPU reads them fast: behind the one odd element (the logit scale) nothing loses its alignment."""

import pytest

from tests.harness import run_ranks

CASE = "tests.distributed.cases_engine:misaligned"


@pytest.mark.parametrize("ds, world_size", [("zero2_bf16.json", 2), ("zero3_bf16.json", 1)])
def test_every_weight_starts_at_16_bytes(ds: str, world_size: int) -> None:
    for found in run_ranks(CASE, world_size=world_size, ds=ds):
        assert set(found) <= {"logit_scale"}


def test_in_the_models_own_order_most_do_not() -> None:
    """The twin."""
    assert len(run_ranks(CASE, world_size=1, ds="zero2_bf16.json", in_order=False)[0]) > 10
