"""Kills, full disks and damage on real ranks: no committed checkpoint is lost, a refusal is the same on all ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases_checkpoint_files import can_mount
from tests.harness import run_ranks
from tests.unit.checkpoint.damage import DAMAGES, HINTS, file_named

CASES = "tests.distributed.cases_checkpoint_files"


def trials(folder: Path, style: str, number: int, seed: int, timeout_s: float) -> dict[str, Any]:
    [result] = run_ranks(
        f"{CASES}:kill_trials", 1, timeout_s=timeout_s, folder=str(folder), trials=number, seed=seed, style=style
    )
    print(
        f"{style}: {result['kills']} kills, {result['lost']} lost, {result['backwards']} backwards,"
        f" {result['committed']} commits; {result['phases']}"
    )
    return result


@pytest.mark.parametrize("number", [30, pytest.param(500, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
def test_kills_lose_nothing_that_was_committed(number: int, tmp_path: Path) -> None:
    ours = trials(tmp_path / "ours", "ours", number, seed=number, timeout_s=12.0 * number)
    assert ours["kills"] == number and ours["committed"] > number
    assert (ours["lost"], ours["backwards"]) == (0, 0), ours["trouble"]
    assert len(ours["phases"]) == 16, "every phase and the random moments had their kills"


@pytest.mark.parametrize("number", [50, pytest.param(500, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
def test_the_order_that_writes_latest_first_does_lose(number: int, tmp_path: Path) -> None:
    """The negative control: the same harness on the order of DeepSpeed's save_checkpoint."""
    control = trials(tmp_path / "control", "latest_first", number, seed=number, timeout_s=12.0 * number)
    assert control["lost"] > 0


needs_mount = pytest.mark.skipif(can_mount() is not None, reason=str(can_mount()))
DISKS = [
    ("one_full", True),
    ("all_full", True),
    ("one_full", False),
    ("too_small", True),
    ("read_only", False),
    ("vanished", True),
]
SAID = {
    "one_full": "No space left on device",
    "all_full": "No space left on device",
    "too_small": "free at",
    "read_only": "Read-only file system",
    "vanished": "No such file or directory",
}


@needs_mount
@pytest.mark.parametrize("what, asynchronous", DISKS)
def test_trouble_with_the_disk_is_one_error_on_all_ranks(what: str, asynchronous: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    results = run_ranks(
        f"{CASES}:disk_case", 2, timeout_s=120, folder=str(folder), what=what, asynchronous=asynchronous
    )
    errors = {result["error"] for result in results}
    assert len(errors) == 1 and SAID[what] in errors.pop(), results
    for result in results:
        assert result["seconds"] < 20, "within the time-out"
        assert result["untouched"], "the checkpoint before is as it was"
        if what != "vanished":  # what was written into a folder that is gone goes with the next start
            assert result["left"] == [], "no temporary file is left"
        assert result["after"] == 3 and result["right"], "training continues, and saves once there is room"
    if what == "one_full":
        assert "rank 1" in results[0]["error"] and "rank 0" not in results[0]["error"]


def test_an_error_of_one_rank_waits_for_no_save(tmp_path: Path) -> None:
    """Nobody else would come to the save's agreement: the rank would hang, and its cause never be printed."""
    took = run_ranks(f"{CASES}:alone_case", 2, timeout_s=120, folder=str(tmp_path))
    assert max(took) < 20 and not list(tmp_path.glob("step_*")), took


def test_damage_is_found_before_any_state_is_touched_and_named_on_all_ranks(tmp_path: Path) -> None:
    results = run_ranks(f"{CASES}:damage_case", 2, timeout_s=240, folder=str(tmp_path), damages=list(DAMAGES))
    for name in DAMAGES:
        first, second = (result[name] for result in results)
        assert first["error"] == second["error"], name
        for result in (first, second):
            if name in HINTS:
                assert result["step"] == 2 and result["right"], name
                assert "latest" in str(result["notes"]), name
                continue
            assert file_named(name) in result["error"], (name, result["error"])
            assert result["untouched"], name
            fallback = result["fallback"]
            assert fallback["step"] == (2 if name == "latest to nowhere" else 1), (name, fallback)
            assert fallback["right"] and file_named(name) in str(fallback["notes"]), name
    assert not list(tmp_path.rglob("*hostile*")) and not Path("hostile-code-was-run").exists()
    assert not list(tmp_path.glob("escaped*"))
