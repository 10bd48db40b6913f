"""The run on one screen: assemble, loop, save, stop when asked, evaluate, hand over the weights."""

import gc
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from amclip_ds import plugins, preconditions, run_files
from amclip_ds.config import TrainConfig
from amclip_ds.data.batch import Batch
from amclip_ds.engine.compile import FALLEN_BACK
from amclip_ds.errors import Preempted, UserError
from amclip_ds.evaluate import rows
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.during_training import evaluate_engines, specs_of
from amclip_ds.jsonl import each
from amclip_ds.pictures import mask_statistics
from amclip_ds.ranks.collectives import on_main
from amclip_ds.resilience.guards import RewindAsked
from amclip_ds.resilience.preemption import restoring_signals
from amclip_ds.run import Run, assemble
from amclip_ds.run_folder import write_run_weights
from amclip_ds.step import StepResult, train_step

FAILED, MADE_UP = "evaluation_failed", "evaluation_made_up"  # incidents; after either, no resume tries it again,
STOPPED = "evaluation_stopped"  # but for one that the run's stop ended


def train(config: TrainConfig, resume: str = "auto", began: float | None = None) -> int:
    """Trains as configured; returns the exit code. Collective: every rank of the world must call.

    began: when the start began, in seconds since the epoch; None: with the process.
    """
    with ExitStack() as stack, plugins.blamed():
        run = assemble(config, resume, stack, began)
        state = run.state
        if evaluation_is_missing(run):
            if run.runtime.is_main:
                run.record.incident(
                    MADE_UP, f"none was made at step {state.step}", action="made before training continues"
                )
            evaluate(run)

        run.timeline.add("training")
        for batch in run.batches():
            result = train_step(
                batch,
                run.student,
                run.teacher,
                run.schedules,
                state.updates,
                run.method,
                run.comm,
                run.plan.micro,
                run.guards,
                run.frozen,
            )
            state.advance(batch, result, config.batch.global_size)
            stop = run.stops.agreed(is_last=state.step == run.total_steps)
            account(run, batch, result)
            run.checkpoints.after_step(state, is_last=state.step == run.total_steps or stop is not None)
            picture(run)
            if stop is not None:
                raise Preempted(f"{stop}; stopped after step {state.step}")
            if evaluation_is_due(run):
                evaluate(run)

        run.watchdog.phase("end", state.step)
        write_run_weights(run.folder, run.student, run.teacher, state.step)
        run.record.say(run.ledger.summary())
        run.record.last_word(str(run.folder))
    return 0


def picture(run: Run) -> None:
    """What the masks keep now, where it is due. Collective: every rank must call."""
    if run.pictures.is_due(run.state.step):
        with run.meter.paused(), run.watchdog.during("evaluate"), run.timeline.during("pictures"):
            progress = run.schedules.progress(run.state.updates)
            run.pictures.after_step(run.state.step, progress, run.student, run.teacher)


def account(run: Run, batch: Batch, result: StepResult) -> None:
    """What the guards, the data's ledger and the record make of a step. Collective: every rank must call.

    Raises RunStopped where either has seen too much.
    """
    state, record = run.state, run.record
    record.step = run.timeline.step = state.step
    with run.meter.paused():  # writing a profile is no step's time
        run.profile.step()
    if line := run.timeline.first_step():
        record.say(line)
    try:
        run.guards.account(state.step, result.applied, result.sample_ids)
    except RewindAsked:
        run.checkpoints.settle()  # the newest one may be under way; one that fails costs only itself
        with run.meter.paused(), run.watchdog.during("resume"), run.timeline.during("resume"):
            run.checkpoints.rewind(state)
    record.incidents(run.ledger.account(batch))
    while FALLEN_BACK:
        record.incident("uncompiled", FALLEN_BACK.pop(0), action="this rank continues, slower")
    if run.runtime.is_main:
        run.forecast.after_step(run.student, run.teacher, state.step, record)
    if run.config.run.log_sample_ids:
        record.sample_ids(state.step, run.comm.all_gather(batch.sample_ids).tolist())
    if record.is_due(state.step):
        run.ledger.settle()
        row = state.numbers() | {"attempt": run.attempt, "time": round(time.time(), 3)}
        row |= run.meter.row(result, masks_of(batch, result, run.method.grid))
        record.metrics(row, note=str(run.meter.verdict(row)))
        run.watchdog.report_slow_ranks(record)


def masks_of(batch: Batch, result: StepResult, grid: int) -> dict[str, float]:
    """What the masks did to this rank's samples of a step that is reported."""
    views = len(result.keep_indices)
    return mask_statistics.of_step(result.keep_indices, result.scores, batch.boxes[:views], grid, batch.flips)


def evaluate(run: Run) -> None:
    """Student and teacher as they are, on the sets of eval.data. Collective: every rank must call.

    What fails is an incident and costs its own rows, never the run nor the checkpoint that was due. A stop ends it
    after a batch: saves, keeps the rows that are whole, and raises Preempted; the resume makes the others. A second
    stop of the same step leaves them to `amclip watch`: an evaluation that outlasts every attempt must not keep the run
    from its next step.
    """
    run.checkpoints.settle()
    with run.meter.paused(), run.watchdog.during("evaluate"), run.timeline.during("evaluate"):
        if run.teacher is not None:
            run.teacher.publish()
        recorded = on_main(partial(recorded_of, run))
        made, failures, stop = evaluate_engines(
            run.student, run.teacher, run.config, run.runtime, run.state.step, run.stops.agreed, recorded
        )
    if stop is not None:
        run.checkpoints.after_step(run.state, is_last=True)
    run.record.evaluation(not_yet_recorded(run, made))
    for cause in failures if run.runtime.is_main else ():
        run.record.say(f"evaluation failed: {cause}; training continues")
        run.record.incident(FAILED, cause, action="training continues; `amclip watch` evaluates the checkpoint later")
    if stop is not None:
        is_again = on_main(partial(was_stopped, run))
        kind, who = (FAILED, "`amclip watch` evaluates it later") if is_again else (STOPPED, "the resume makes it")
        if run.runtime.is_main:
            run.record.incident(kind, stop, action=f"saved; {who}")
        raise Preempted(f"{stop}; stopped in the evaluation of step {run.state.step}: {who}")


def not_yet_recorded(run: Run, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that a watch, or this run before a kill, has not written. Empty on ranks other than 0."""
    try:
        return rows.new(run.folder, made) if run.runtime.is_main else []
    except UserError:  # the file cannot be read: a row too many is better than one that is lost
        return made


def recorded_of(run: Run) -> set[tuple[Any, ...]]:
    """(weights, data set, task) of this step's rows: of a watch, or of this run before it was stopped. Rank 0 only."""
    try:
        return rows.of_step(run.folder, run.state.step)
    except UserError:  # the file cannot be read: all are made
        return set()


def was_stopped(run: Run) -> bool:
    """Whether an evaluation of this step was stopped before. Rank 0 only."""
    try:
        return STOPPED in kinds_of(run)
    except UserError:  # the file cannot be read, which must not take the stop's place
        return False


def kinds_of(run: Run) -> list[str]:
    """What became of earlier evaluations of this step: FAILED, MADE_UP, STOPPED. Rank 0 only. Raises UserError."""
    incidents = each(run.folder / run_files.INCIDENTS, run_files.STEP | {"kind": str})
    kinds = [row["kind"] for row in incidents if row["step"] == run.state.step]
    return [kind for kind in kinds if kind in (FAILED, MADE_UP, STOPPED)]


def evaluation_is_due(run: Run) -> bool:
    """Every eval.every_steps, and at the end."""
    every, step = run.config.eval.every_steps, run.state.step
    is_turn = step == run.total_steps or (every is not None and step % every == 0)
    return run.config.eval.data is not None and is_turn


def evaluation_is_missing(run: Run) -> bool:
    """Whether the run resumes from a step whose evaluation was not made, and not tried in vain either. One that a stop
    ended was promised, though by the settings of now (a longer run, another eval.every_steps) none is due there.

    Collective: every rank must call.
    """
    weights = ["student", *(["teacher"] if run.teacher is not None else [])]

    def is_missing() -> bool:
        try:
            last = kinds_of(run)[-1:]
            if last != [STOPPED] and (last or not evaluation_is_due(run)):
                return False
            sets = [open_set(spec, key="eval.data") for spec in specs_of(run.config)]
            return bool(rows.missing(run.folder, run.state.step, sets, weights))
        except UserError as error:
            run.record.say(
                f"whether step {run.state.step} is evaluated cannot be found out: {error}; training continues"
            )
            return False

    return run.state.step > 0 and run.config.eval.data is not None and on_main(is_missing)


class _Callable(ModuleType):
    """`amclip_ds.train(config)` of the Python interface and this module share one name; this makes both hold."""

    def __call__(self, config: TrainConfig, resume: str = "auto") -> Path:
        """Trains, in this process or as one rank of a launcher's world, and returns the run's folder.

        It may be called again. Raises AmclipError where the command would end with another code than 0.
        """
        if not isinstance(config, TrainConfig):
            raise UserError(f"train: a {type(config).__name__}, where load_config's TrainConfig is expected")
        if threading.current_thread() is not threading.main_thread():
            raise UserError("train: call it from the program's main thread, which alone hears signals")
        began = time.time()  # the program's own, which may have run for hours, is none of the training's
        preconditions.check(config, resume)
        with restoring_signals():
            train(config, resume, began)
        gc.collect()  # engines are cycles, and a GPU's memory is none of what Python goes by
        return Path(config.run.out)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    print("python -m amclip_ds.train runs nothing; type: python -m amclip_ds train (or amclip train)", file=sys.stderr)
    sys.exit(2)
