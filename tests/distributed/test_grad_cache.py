"""GradCache: the gradients of any split are those of the whole batch, at every stage."""

import math
import re
from functools import cache

import pytest
from torch import Tensor

from tests.distributed.equivalence import WITHOUT_GRADIENT
from tests.harness import RankFailed, run_ranks

STAGES = [f"zero{stage}_fp32.json" for stage in range(4)]


@cache
def gradients(ds: str, breaks: str | None = None, roles: bool = False) -> dict[int, dict[str, Tensor]]:
    case = "tests.distributed.cases_engine:gradients_by_split"
    return run_ranks(case, world_size=2, timeout_s=600, ds=ds, breaks=breaks, roles=roles)[0]


def worst_error(whole: dict[str, Tensor], split: dict[str, Tensor]) -> float:
    """|difference| over the tensor's norm, with a floor of 1e-6 of the global norm; what has no gradient in exact
    arithmetic holds rounding alone and is left out."""
    floor = 1e-6 * math.sqrt(sum(float(grad.square().sum()) for grad in whole.values()))
    return max(
        float((split[name] - grad).norm()) / max(float(grad.norm()), floor)
        for name, grad in whole.items()
        if not re.search(WITHOUT_GRADIENT, name)
    )


@pytest.mark.quick
@pytest.mark.parametrize("ds", STAGES)
def test_gradients_of_every_split(ds: str) -> None:
    found = gradients(ds)
    assert set(found) == {1, 2, 3, 4, 8}
    for split in (2, 3, 4, 8):
        assert worst_error(found[1], found[split]) <= 1e-5, split


@pytest.mark.parametrize("ds", [*(pytest.param(ds, marks=pytest.mark.nightly) for ds in STAGES[:3]), STAGES[3]])
def test_views_of_several_masks_and_a_second_text_pass(ds: str) -> None:
    """Two passes of the vision tower, of 8 and of 4 tokens, and the text tower over shortened texts."""
    found, alike = gradients(ds, roles=True), gradients(ds)
    for split in (2, 3, 4, 8):
        assert worst_error(found[1], found[split]) <= 1e-5, split
    assert worst_error(alike[1], found[1]) > 1e-2  # the masks and texts are others


@pytest.mark.nightly
def test_gradients_reduced_after_each_call_of_a_block_fail() -> None:
    """The twin at ZeRO-3: views of two masks call a block twice."""
    with pytest.raises(RankFailed, match="AssertionError"):
        gradients("zero3_fp32.json", "leaves", roles=True)


@pytest.mark.parametrize(
    ("ds", "breaks"),
    [
        ("zero1_fp32.json", "boundary"),
        ("zero2_fp32.json", "boundary"),
        ("zero3_fp32.json", "last"),
        ("zero2_fp32.json", "masks"),
    ],
)
def test_a_wrong_boundary_or_another_mask_fails(ds: str, breaks: str) -> None:
    found = gradients(ds, breaks)
    assert all(worst_error(found[1], found[split]) > 1e-2 for split in (2, 4, 8))
