"""Agreed stops, lost folders and slow ranks, on real gloo ranks."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.harness import RankFailed, run_ranks

CASES = "tests.distributed.cases_resilience:"


@pytest.mark.parametrize(
    "to, how, times",
    [
        ([1], "SIGUSR1", 1),
        ([0, 1], "SIGTERM", 1),
        ([1], "SIGINT", 2),
        ([0], "SIGHUP", 1),
        ([], "STOP", 1),
        ([], "limit", 1),
        ([], "slurm", 1),
    ],
)
def test_all_ranks_stop_at_the_same_step(to: list[int], how: str, times: int, tmp_path: Path) -> None:
    results = run_ranks(f"{CASES}stop_case", world_size=2, folder=str(tmp_path), to=to, how=how, times=times)
    assert len({(result["step"], result["reason"]) for result in results}) == 1
    step, reason = results[0]["step"], results[0]["reason"]
    for result in results:  # asked to stop, a rank is leaving: nothing may take its exit code's place
        assert result["handlers"] == [signal.SIG_IGN] * 4
    if how.startswith("SIG"):
        assert step in (5, 6) and reason == f"{how} on rank {max(to)}"
        assert results[max(to)]["count"] == times
    else:
        reported = {
            "STOP": "a STOP file",
            "limit": "run.time_limit=00:00:01 is near",
            "slurm": "the end of the Slurm job is near",
        }
        assert 5 <= step < 300 and reason == reported[how]
    assert not (tmp_path / "STOP").exists(), "a STOP file that was heard must not stop the next start"


def test_a_stop_file_that_cannot_be_removed_stops_all_the_same(tmp_path: Path) -> None:
    for result in run_ranks(f"{CASES}stop_case", folder=str(tmp_path), to=[], how="STOP folder"):
        assert 5 <= result["step"] < 300 and result["reason"] == "a STOP file"


@pytest.mark.nightly
def test_ahead_of_the_device_all_ranks_stop_a_step_later(tmp_path: Path) -> None:
    case = {"folder": str(tmp_path), "to": [1], "how": "SIGUSR1", "is_ahead": True}
    for result in run_ranks(f"{CASES}stop_case", world_size=2, **case):
        assert result["step"] in (6, 7) and result["reason"] == "SIGUSR1 on rank 1"


def test_nobody_stops_unasked(tmp_path: Path) -> None:
    """The twin."""
    for result in run_ranks(f"{CASES}stop_case", world_size=2, folder=str(tmp_path), to=[], how="nothing"):
        assert (result["step"], result["reason"]) == (300, None)
        assert result["handlers"] == [signal.SIG_DFL, signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL]


def test_what_a_rank_forked_neither_dies_of_signals_nor_reports_them(tmp_path: Path) -> None:
    [result] = run_ranks(f"{CASES}children_case", world_size=1, folder=str(tmp_path))
    assert result == {"alive": True, "code": 0, "reason": None, "count": 0}


def test_a_save_that_never_ends_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="exit status 1"):
        run_ranks(f"{CASES}forced_exit_case", world_size=1, timeout_s=25, folder=str(tmp_path))


def test_every_rank_hears_that_the_folder_is_anothers(tmp_path: Path) -> None:
    heard = run_ranks(f"{CASES}lost_case", world_size=2, folder=str(tmp_path))
    assert heard[0] == heard[1] and "took this folder over" in heard[0][0]


def test_the_slow_rank_is_named_once_and_only_if_it_lasts() -> None:
    for found in run_ranks(f"{CASES}slow_case", world_size=2, seconds=0.1):
        assert [len(interval) for interval in found] == [0, 1, 0]
        assert found[1][0][0] == 1 and "rank 1 takes" in found[1][0][1]


def test_even_ranks_are_not_named() -> None:
    """The twin."""
    for found in run_ranks(f"{CASES}slow_case", world_size=2, seconds=0.0):
        assert found == [[], [], []]


@pytest.mark.parametrize("launcher, how", [("--procs", "left with 75"), ("torchrun", "left with 0")])
def test_75_is_for_our_own_launcher(launcher: str, how: str) -> None:
    assert run_ranks(f"{CASES}leaving_case", world_size=2, launcher=launcher) == [how, how]


def needs_mounts() -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")


@pytest.mark.parametrize(
    "alone, options, why",
    [(-1, "", None), (1, "", "missing"), (0, "nr_inodes=1", "No space left on device"), (0, "nr_inodes=2", "No space")],
    ids=["shared", "private", "full", "almost full"],
)
def test_ranks_without_a_temporary_folder_in_common_train_unwatched(
    alone: int, options: str, why: str | None, tmp_path: Path
) -> None:
    needs_mounts()
    case = {"folder": str(tmp_path), "alone": alone, "options": options}
    main, other = run_ranks(f"{CASES}tmp_case", world_size=2, **case)
    assert main["process"] == (why is None) and not other["process"]
    assert not other["said"] and not main["left"]
    if why:
        [(cause, action)] = main["said"]
        assert why in cause and "no temporary folder in common" in cause and action == "no hang is noticed there"
    else:
        assert not main["said"]


def test_a_watch_that_cannot_start_is_no_reason_not_to_train(tmp_path: Path) -> None:
    """Room for the signs of life, but not for what the watching process reads."""
    needs_mounts()
    case = {"folder": str(tmp_path), "alone": 0, "options": "nr_inodes=4"}
    [found] = run_ranks(f"{CASES}tmp_case", world_size=1, **case)
    assert not found["process"] and not found["left"]
    assert "no watching process starts (No space left on device)" in found["said"][0][0]
