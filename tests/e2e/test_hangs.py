"""A stopped rank and a blocked loader: seen, named with the stacks of all ranks, ended, nothing left behind."""

import os
import signal
import time
from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.e2e.trainers import Trainer, tiny
from tests.harness import RankFailed, run_ranks

pytestmark = pytest.mark.timeout(3000)
LIMIT_S = 8


def assert_named(run: Path, phase: str) -> str:
    """One incident naming rank 1 and its phase, and the stacks of both ranks. Returns the incident's cause."""
    [row] = [row for row in read_lines(run / "incidents.jsonl") if row["kind"] == "hang"]
    assert (row["rank"], row["key"]) == (1, phase), row
    [kept] = (run / "hangs").glob("*.txt")
    assert kept.read_text().count("=== rank ") == 2
    assert kept.read_text().count("train.py") >= 2, kept.read_text()
    assert not (run / "exit.json").exists(), "a hang is no verdict of the run's"
    return row["cause"]


def test_a_stopped_rank(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(run, tiny(scenes, run, "run.steps=100000", f"watchdog.step_timeout_s={LIMIT_S}"))
    try:
        trainer.wait_step(5)
        os.kill(trainer.rank(1), signal.SIGSTOP)
        stopped = time.monotonic()
        assert trainer.end() != 0
        assert time.monotonic() - stopped < LIMIT_S + 30
        assert_named(run, read_lines(run / "incidents.jsonl")[-1]["key"])
        assert "stopped (SIGSTOP" in trainer.printed() and "rank 1" in trainer.printed()
        assert not trainer.left_behind()
    finally:
        trainer.kill()


def test_a_blocked_loader(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ["train", *tiny(scenes, run, "run.steps=100000", f"watchdog.step_timeout_s={LIMIT_S}")]
    with pytest.raises(RankFailed, match="exit status -9"):
        run_ranks("tests.e2e.cases:blocked_loader", world_size=2, timeout_s=600, argv=argv, rank=1, after=5)
    assert "behind" in assert_named(run, "data")


@pytest.mark.nightly
def test_a_rank_that_never_leaves_its_step(scenes: Path, tmp_path: Path) -> None:
    """All ranks are in the same phase of the same step; the stacks show who does not wait in a collective."""
    run = tmp_path / "run"
    argv = ["train", *tiny(scenes, run, "run.steps=100000", f"watchdog.step_timeout_s={LIMIT_S}")]
    with pytest.raises(RankFailed, match="exit status -9"):
        run_ranks("tests.e2e.cases:endless_step", world_size=2, timeout_s=600, argv=argv, rank=1, after=5)
    assert "the others wait for it" in assert_named(run, "step")


@pytest.mark.nightly
def test_a_run_that_only_pauses_continues(scenes: Path, tmp_path: Path) -> None:
    """The twin: stopped for less than the limit, nothing is reported."""
    run = tmp_path / "run"
    trainer = Trainer(run, tiny(scenes, run, "watchdog.step_timeout_s=60"))
    try:
        trainer.wait_step(5)
        os.kill(trainer.rank(1), signal.SIGSTOP)
        time.sleep(3)
        os.kill(trainer.rank(1), signal.SIGCONT)
        assert trainer.end() == 0, trainer.printed()
        assert not (run / "hangs").exists() and not trainer.left_behind()
    finally:
        trainer.kill()
