"""The rank harness itself: results by rank, a failing rank is raised, a hanging rank is killed."""

import os
import time

import pytest

from tests.harness import RankFailed, run_ranks


def rank_and_world(add: int = 0) -> tuple[int, int]:
    return int(os.environ["RANK"]) + add, int(os.environ["WORLD_SIZE"])


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")


def hang() -> None:
    time.sleep(600)


def test_results_come_back_by_rank() -> None:
    assert run_ranks("tests.distributed.test_harness:rank_and_world", world_size=3, add=10) == [
        (10, 3),
        (11, 3),
        (12, 3),
    ]


def test_a_failing_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match="rank one is unwell"):
        run_ranks("tests.distributed.test_harness:fail_on_one", world_size=2)


def test_a_hanging_rank_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="out of time"):
        run_ranks("tests.distributed.test_harness:hang", world_size=2, timeout_s=1)
    assert time.monotonic() - start < 60
