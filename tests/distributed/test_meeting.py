"""A port that is taken between its choice and its use is no failure of a run that chose it itself."""

import pytest

from tests.harness import RankFailed, run_ranks

CASE = "tests.distributed.cases_meeting:meeting_case"


def test_another_port_is_drawn_for_one_that_was_taken_meanwhile() -> None:
    assert run_ranks(CASE, world_size=1, taken_draws=0) == [1]
    assert run_ranks(CASE, world_size=1, taken_draws=2) == [3]


def test_ports_that_are_all_taken_are_named() -> None:
    with pytest.raises(RankFailed, match="MASTER_PORT: port .* is in use"):
        run_ranks(CASE, world_size=1, taken_draws=100)
