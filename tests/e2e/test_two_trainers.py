"""Two trainers on one run folder: the second is refused; a silent first is replaced, and stops when it wakes."""

import os
import signal
from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.e2e.trainers import Trainer, checkpoints, tiny, verdict

STEPS = 140
QUICK = (
    f"run.steps={STEPS}",
    "checkpoint.every_steps=20",
    "ownership.heartbeat_s=0.5",
    "ownership.stale_s=10",
    "watchdog.step_timeout_s=null",
)

pytestmark = pytest.mark.timeout(3000)


def test_refused_then_taken_over_then_the_first_stops(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Trainer(run, tiny(scenes, run, *QUICK), procs=None)
    trainers = [first]
    try:
        first.wait_for("a checkpoint", lambda: bool(checkpoints(run)))
        trainers.append(Trainer(run, tiny(scenes, run, *QUICK), procs=None))
        assert trainers[-1].end() == 2
        assert f"process {first.process.pid} on" in trainers[-1].printed(), trainers[-1].printed()
        assert first.process.poll() is None, first.printed()

        os.kill(first.process.pid, signal.SIGSTOP)
        reached = max(row["step"] for row in read_lines(run / "metrics.jsonl"))
        trainers.append(Trainer(run, tiny(scenes, run, *QUICK), procs=None))
        trainers[-1].wait_step(reached + 8)
        assert "taken over" in trainers[-1].printed()

        os.kill(first.process.pid, signal.SIGCONT)
        assert first.end() == 3, first.printed()
        assert "another trainer took" in first.printed()
        assert trainers[-1].end() == 0, trainers[-1].printed()
        assert verdict(run)["step"] == checkpoints(run)[-1] == STEPS
        rows = read_lines(run / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once"
        assert {row["attempt"] for row in rows if row["step"] > reached} == {1}
        assert not any(trainer.left_behind() for trainer in trainers)
    finally:
        for trainer in trainers:
            trainer.kill()
