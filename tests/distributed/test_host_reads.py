"""A step off the log cadence leaves the host ahead of the device: the numbers it reads, its uploads and how many
operators it starts are held."""

import pytest

from tests.harness import run_ranks

# Reads: of the norm, by FlatGradients.step; at other stages DeepSpeed asks three times, when it is on the CPU. Uploads:
# the table of photometric changes, the order of texts by length; both go by page-locked memory. Operators: at most, and
# less than one a weight above those of today (torch 2.11), so that a loop over the weights is seen.
RECIPES = {
    "aclip-tiny": {"reads": 1, "uploads": 2, "operators": 2850},  # 99 weights; 2,793
    "aclip-eff-tiny": {"reads": 1, "uploads": 2, "operators": 2860},
    "clip-tiny": {"reads": 1, "uploads": 1, "operators": 1320},  # its one view is not changed
    "detailclip-tiny": {"reads": 1, "uploads": 2, "operators": 3000},  # scores of views, and centres
    "pgs-tiny": {"reads": 1, "uploads": 1, "operators": 1480},
}
STAGES = {
    "zero0_fp32.json": {"reads": 1, "uploads": 2, "operators": 3200},
    "zero2_bf16.json": {"reads": 3, "uploads": 2, "operators": 4470},
}


def traffic(recipe: str, **words: object) -> dict[str, int]:
    [found] = run_ranks("tests.distributed.cases_reads:traffic", world_size=1, recipe=recipe, **words)
    return found


def excess(found: dict[str, int], held: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What is not as held, found beside held; fewer operators are no fault."""
    found = found | {"operators": max(found["operators"], held["operators"])}
    return {name: (found[name], number) for name, number in held.items() if found[name] != number}


@pytest.mark.parametrize(
    "recipe", ["aclip-tiny", *(pytest.param(name, marks=pytest.mark.nightly) for name in [*RECIPES][1:])]
)
def test_a_step_reads_the_norm_alone(recipe: str) -> None:
    assert not excess(traffic(recipe), RECIPES[recipe])


@pytest.mark.nightly
@pytest.mark.parametrize("ds", STAGES)
def test_at_other_stages(ds: str) -> None:
    assert not excess(traffic("aclip-tiny", words=[f"engine.deepspeed={ds}"]), STAGES[ds])


@pytest.mark.nightly
def test_one_more_read_or_upload_is_counted() -> None:
    """The twins: a loss that is read, and views that are chosen by a list."""
    assert excess(traffic("aclip-tiny", spoilt="loss"), RECIPES["aclip-tiny"]) == {"reads": (2, 1)}
    views = ["mask.strategy=random", "data.views.1.mask.strategy=centered"]
    assert (
        traffic("random2x-tiny", spoilt="index_list", words=views)["uploads"]
        > traffic("random2x-tiny", words=views)["uploads"]
    )


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["aclip-tiny", "clip-tiny"])
def test_a_loop_over_the_weights_is_counted(recipe: str) -> None:
    """The twin: it reads nothing and uploads nothing."""
    assert excess(traffic(recipe, spoilt="each_weight"), RECIPES[recipe]).keys() == {"operators"}
