"""Signals to real trainers: one agreed stop, one checkpoint, code 75, and a resume that equals no stop."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.cli import main
from amclip_ds.jsonl import read_lines
from tests.e2e.conftest import Amclip
from tests.e2e.trainers import STEPS, Trainer, checkpoints, outcome, tiny, verdict
from tests.harness import run_ranks

pytestmark = pytest.mark.timeout(3000)
Send = Callable[[Trainer], None]


@pytest.fixture(scope="module")
def undisturbed(amclip: Amclip, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of two ranks comes to when nobody disturbs it."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, printed = amclip("train", *tiny(scenes, run), ranks=2, timeout_s=600)
    assert code == 0, printed
    return outcome(run)


@pytest.fixture
def started(scenes: Path, tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """started("key=value", ...) -> a Trainer of two ranks on tmp_path/run; whatever is left of it is ended."""
    trainers: list[Trainer] = []

    def start(*more: str, procs: int | None = 2) -> Trainer:
        trainers.append(Trainer(tmp_path / "run", tiny(scenes, tmp_path / "run", *more), procs))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.kill()


def to_rank(number: int, *signals: signal.Signals) -> Send:
    def send(trainer: Trainer) -> None:
        pid = trainer.rank(number)  # asked once: after the first signal it may be leaving
        for one in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, one)

    return send


def to_launcher(*signals: signal.Signals) -> Send:
    return lambda trainer: [os.kill(trainer.process.pid, one) for one in signals][-1]


def to_everything(trainer: Trainer) -> None:
    """As `scancel --full` does it: launcher, ranks, loader workers, checkpoint writers."""
    for pid in trainer.living():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def touch_stop(trainer: Trainer) -> None:
    (trainer.run / "STOP").touch()


DISTURBANCES: dict[str, Send] = {
    "one rank, twice": to_rank(1, signal.SIGUSR1, signal.SIGUSR1),
    "launcher": to_launcher(signal.SIGTERM),
    "everything": to_everything,
    "Ctrl-C": to_launcher(signal.SIGINT, signal.SIGINT),
    "rank 0": to_rank(0, signal.SIGTERM),
    "a file": touch_stop,
}
IN_TEST = {"one rank, twice"}
CASES = [
    pytest.param(send, id=name, marks=() if name in IN_TEST else pytest.mark.nightly)
    for name, send in DISTURBANCES.items()
]


def assert_stopped_well(trainer: Trainer) -> int:
    """Code 75 and its verdict, one new checkpoint at the agreed step, nothing left running. Returns the step."""
    assert trainer.end() == 75, trainer.printed()
    reported = verdict(trainer.run)
    assert reported["code"] == 75 and reported["attempt"] == 0
    assert checkpoints(trainer.run)[-1] == reported["step"] == read_lines(trainer.run / "metrics.jsonl")[-1]["step"]
    assert not trainer.left_behind()
    return reported["step"]


def assert_resumes_as_if_undisturbed(trainer: Trainer, step: int, undisturbed: dict[str, Any]) -> None:
    assert trainer.end() == 0, trainer.printed()
    assert verdict(trainer.run) | {"reason": ""} == {"code": 0, "step": STEPS, "attempt": 1, "reason": ""}
    assert {row["attempt"] for row in read_lines(trainer.run / "metrics.jsonl") if row["step"] > step} == {1}
    assert outcome(trainer.run) == undisturbed


@pytest.mark.parametrize("send", CASES)
def test_one_stop_one_checkpoint_75_and_an_exact_resume(
    send: Send, started: Callable[..., Trainer], undisturbed: dict[str, Any]
) -> None:
    trainer = started("data.workers=1")  # which hear none of the signals, and are not left behind
    trainer.wait_step(3)
    send(trainer)
    step = assert_stopped_well(trainer)
    assert 3 <= step < STEPS
    assert_resumes_as_if_undisturbed(started(), step, undisturbed)


def test_a_stop_during_an_evaluation_is_heard_after_a_batch(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    """Saved at once, also while the resume makes the evaluation up. Whole rows are not made again, and at its second
    stop an evaluation is left to a watch: no step and no row is lost, and no attempt after another."""
    short = ("run.steps=4", "checkpoint.every_steps=4", "eval.every_steps=2", "eval.batch_size=4")
    short = (*short, f"eval.data={scenes}")
    code, printed = amclip("train", *tiny(scenes, tmp_path / "calm", *short), ranks=2)
    assert code == 0, printed

    run = tmp_path / "run"
    argv = ["train", *tiny(scenes, run, *short)]
    # Of 2 x 16 batches a step: in the teacher's part of step 2; after what that had left, in step 4; in step 4 again.
    for attempt, (batch, step) in enumerate([(19, 2), (17, 4), (3, 4)]):
        results = run_ranks("tests.e2e.cases:signal_in_evaluation", argv=argv, rank=1, batch=batch, timeout_s=300)
        assert {batches for _, _, batches in results} == {batch}, results  # what was left was not waited for
        assert verdict(run) | {"reason": ""} == {"code": 75, "step": step, "attempt": attempt, "reason": ""}, results
        assert f"SIGUSR1 on rank 1; stopped in the evaluation of step {step}: " in verdict(run)["reason"]
        assert checkpoints(run)[-1] == step
    assert verdict(run)["reason"].endswith(": `amclip watch` evaluates it later")

    code, printed = amclip(*argv, ranks=2)
    assert code == 0, printed
    assert outcome(run) == outcome(tmp_path / "calm")
    assert rows_made(run) == [(2, "student"), (2, "teacher")]
    incidents = [row["kind"] for row in read_lines(run / "incidents.jsonl")]
    assert incidents == [*["evaluation_stopped", "evaluation_made_up"] * 2, "evaluation_failed"]
    assert main(["watch", str(run), "--once"]) == 0
    assert rows_made(run) == rows_made(tmp_path / "calm")


def test_a_stopped_evaluation_is_made_though_none_is_due_now(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    """Stopped in the evaluation of its end; then moved, made longer, and resumed on another world."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    short = (f"eval.data={scenes}", "eval.batch_size=4", "checkpoint.every_steps=2")
    argv = ["train", *tiny(scenes, run, *short, "run.steps=2")]
    run_ranks("tests.e2e.cases:signal_in_evaluation", argv=argv, rank=1, batch=3, timeout_s=300)
    assert verdict(run)["code"] == 75 and rows_made(run) == []

    run.rename(moved)
    longer = tiny(scenes, moved, *short, "run.steps=3", "checkpoint.allow_drift=[run.steps]")
    code, printed = amclip("train", *longer)
    assert code == 0, printed
    assert rows_made(moved) == [(step, weights) for step in (2, 3) for weights in ("student", "teacher")]


def rows_made(run: Path) -> list[tuple[int, str]]:
    """Step and weights of each row of eval.jsonl."""
    return [(row["step"], row["weights"]) for row in read_lines(run / "eval.jsonl")]


@pytest.mark.nightly
def test_a_signal_during_a_save(started: Callable[..., Trainer], undisturbed: dict[str, Any]) -> None:
    """The save under way is not torn: both it and the stop's own are valid."""
    trainer = started("checkpoint.every_steps=2")
    folder = trainer.run / "checkpoints"
    trainer.wait_for("a save", lambda: any(folder.glob(".tmp-*")) if folder.exists() else False)
    to_everything(trainer)
    step = assert_stopped_well(trainer)
    assert_resumes_as_if_undisturbed(started("checkpoint.every_steps=2"), step, undisturbed)


@pytest.mark.nightly
def test_a_signal_before_the_first_step_is_not_lost(
    started: Callable[..., Trainer], undisturbed: dict[str, Any]
) -> None:
    """Sent while the ranks still import: they learn of it when they can, and stop after the first step."""
    trainer = started()
    trainer.wait_for("the ranks", lambda: len(trainer.living()) >= 3)
    to_launcher(signal.SIGUSR1)(trainer)
    step = assert_stopped_well(trainer)
    assert step <= 1
    assert_resumes_as_if_undisturbed(started(), step, undisturbed)


@pytest.mark.nightly
def test_alone_and_by_the_clock(started: Callable[..., Trainer]) -> None:
    """`amclip train` without a launcher, stopped by run.time_limit."""
    trainer = started("run.steps=100000", "run.time_limit=00:00:03", procs=None)
    step = assert_stopped_well(trainer)
    assert step > 0 and "run.time_limit" in verdict(trainer.run)["reason"]
