"""What a step waits for others: DeepSpeed's collectives and ours are timed, and a late rank shows at the others."""

import pytest

from tests.harness import run_ranks

CASE = "tests.distributed.cases_engine:communication_time"
LATE_S = 1.0


@pytest.mark.parametrize("ds", ["zero2_bf16.json", "zero3_fp32.json"])
def test_the_others_wait_for_a_late_rank(ds: str) -> None:
    late, other = run_ranks(CASE, world_size=2, timeout_s=300, ds=ds, late_rank=0, late_s=LATE_S)
    assert other["waited"] > 0.8 * LATE_S and other["waited"] <= other["elapsed"]
    assert 0 < late["waited"] < other["waited"] - 0.5 * LATE_S
    assert late["paused"] == other["paused"] == 0.0


def test_without_the_backend_the_engines_collectives_are_missed() -> None:
    """The twin: what DeepSpeed exchanges goes through the backend that is wrapped."""
    with_door, _ = run_ranks(CASE, world_size=2, timeout_s=300, ds="zero3_fp32.json", late_rank=1, late_s=0.0)
    without, _ = run_ranks(
        CASE, world_size=2, timeout_s=300, ds="zero3_fp32.json", late_rank=1, late_s=0.0, through_the_door=False
    )
    assert 0 < without["calls"] < with_door["calls"] / 2
