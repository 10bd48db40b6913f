"""A gather with gradient: each rank gets the sum of what all ranks want of its rows, and no more is moved."""

import pytest

from tests.harness import run_ranks

CASE = "tests.distributed.cases_collectives:gathered"


@pytest.mark.parametrize(
    ("world_size", "dtype", "shape", "error"),
    [
        (2, "float64", (4,), 0.0),
        (4, "float32", (2, 5), 1e-6),
        pytest.param(3, "bfloat16", (4,), 0.05, marks=pytest.mark.nightly),
    ],
)
def test_the_backward_pass_reduces_and_scatters(
    world_size: int, dtype: str, shape: tuple[int, ...], error: float
) -> None:
    for found in run_ranks(CASE, world_size=world_size, dtype=dtype, shape=shape):
        assert found["values"] == 0 and found["gradient"] <= error and found["untouched"], found
        assert found["moved"] == {"reduce_scatter_tensor": found["own"]}  # not all rows, which all_reduce would sum
