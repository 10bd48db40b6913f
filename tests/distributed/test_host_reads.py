"""A step off the log cadence leaves the host ahead of the device: how many numbers it reads, and uploads, is held."""

import pytest

from tests.harness import run_ranks

# Reads: of the norm, by FlatGradients.step; at other stages DeepSpeed asks three times, when it is on the CPU. Uploads:
# the table of photometric changes, the order of texts by length; both go by page-locked memory.
AT_STAGE_1 = {"reads": 1, "uploads": 2}
RECIPES = {
    "aclip-tiny": AT_STAGE_1,
    "aclip-eff-tiny": AT_STAGE_1,
    "clip-tiny": {"reads": 1, "uploads": 1},  # its one view is not changed
    "detailclip-tiny": AT_STAGE_1,  # scores of views, and centres
    "pgs-tiny": {"reads": 1, "uploads": 1},
}
STAGES = {  # with what DeepSpeed makes of numbers there, for each of two groups: its mark of a norm that is not finite
    "zero0_fp32.json": {"reads": 1, "uploads": 2},
    "zero2_bf16.json": {"reads": 3, "uploads": 4},
}


def traffic(recipe: str, **words: object) -> dict[str, int]:
    [found] = run_ranks("tests.distributed.cases_reads:traffic", world_size=1, recipe=recipe, **words)
    return found


@pytest.mark.parametrize(
    "recipe", ["aclip-tiny", *(pytest.param(name, marks=pytest.mark.nightly) for name in [*RECIPES][1:])]
)
def test_a_step_reads_the_norm_alone(recipe: str) -> None:
    assert traffic(recipe) == RECIPES[recipe]


@pytest.mark.nightly
@pytest.mark.parametrize("ds", STAGES)
def test_at_other_stages(ds: str) -> None:
    assert traffic("aclip-tiny", words=[f"engine.deepspeed={ds}"]) == STAGES[ds]


@pytest.mark.nightly
def test_one_more_read_or_upload_is_counted() -> None:
    """The twins: a loss that is read, and views that are chosen by a list."""
    assert traffic("aclip-tiny", spoilt="loss") == {"reads": 2, "uploads": 2}
    views = ["mask.strategy=random", "data.views.1.mask.strategy=centered"]
    assert (
        traffic("random2x-tiny", spoilt="index_list", words=views)["uploads"]
        > traffic("random2x-tiny", words=views)["uploads"]
    )
