"""The rank harness itself: results by rank, a failing rank is raised, a hanging rank is killed."""

import os
import signal
import threading
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


def test_a_case_that_is_cut_short_answers_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytest-timeout and Ctrl-C cut one short: the next case's answer is its own."""

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR2, cut)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    try:
        run_ranks("tests.distributed.test_harness:rank_and_world", world_size=2)  # the server is at work
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_ranks("tests.distributed.test_harness:hang", world_size=2, timeout_s=60)
        found = run_ranks("tests.distributed.test_harness:rank_and_world", world_size=3)
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)
    assert found == [(0, 3), (1, 3), (2, 3)]


def test_a_hanging_rank_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match="out of time"):
        run_ranks("tests.distributed.test_harness:hang", world_size=2, timeout_s=1)
    assert time.monotonic() - start < 60
