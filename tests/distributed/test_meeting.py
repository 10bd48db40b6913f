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


def test_two_ranks_on_one_gpu_are_named_before_nccl_hears_of_it() -> None:
    case = "tests.distributed.cases_meeting:gpus_case"
    assert run_ranks(case, world_size=3, gpus=["a", "b", "c"]) == ["", "", ""]
    said = run_ranks(case, world_size=3, gpus=["a", "b", "a"])
    assert len(set(said)) == 1 and said[0].startswith("ranks 0 and 2 share one GPU of ")
    assert "(a): start one rank per GPU" in said[0]


def test_a_group_that_gloo_does_not_connect_is_one_line_with_the_fix() -> None:
    for said in run_ranks("tests.distributed.cases_meeting:no_interface_case", world_size=2):
        assert len(said) == 2
        assert all("through gloo" in line and "GLOO_SOCKET_IFNAME" in line and "\n" not in line for line in said)
