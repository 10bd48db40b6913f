"""The run on one screen: assemble, loop, evaluate, save, stop when asked, hand over the weights."""

from contextlib import ExitStack

from amclip_ds import config as settings
from amclip_ds.config import TrainConfig
from amclip_ds.data.batch import Batch
from amclip_ds.engine.collectives import on_main
from amclip_ds.errors import Preempted
from amclip_ds.evaluate import rows
from amclip_ds.evaluate.during_training import evaluate_engines, sets_of
from amclip_ds.resilience.guards import RewindAsked
from amclip_ds.run import Run, assemble
from amclip_ds.run_folder import write_run_weights
from amclip_ds.step import StepResult, train_step


def train(config: TrainConfig, resume: str = "auto") -> int:
    """Trains as configured; returns the exit code. Collective: every rank of the world must call."""
    settings.check_buildable(config)
    with ExitStack() as stack:
        run = assemble(config, resume, stack)
        state = run.state
        if evaluation_was_forestalled(run):
            evaluate(run)

        for batch in run.batches():
            result = train_step(batch, run.student, run.teacher, run.schedules, state.updates, config, run.comm,
                                run.plan.micro, run.guards)  # fmt: skip
            state.advance(batch, result, config.batch.global_size)
            stop = run.stops.agreed(is_last=state.step == run.total_steps)
            account(run, batch, result)
            if stop is None and evaluation_is_due(run):
                evaluate(run)
            run.keeper.after_step(state, is_last=state.step == run.total_steps or stop is not None)
            if stop is not None:
                raise Preempted(f"{stop}; stopped after step {state.step}")

        run.watchdog.phase("end", state.step)
        write_run_weights(run.folder, run.student, run.teacher, state.step, run.runtime.is_main)
        run.record.say(run.ledger.summary())
        run.record.say(str(run.folder))
    return 0


def account(run: Run, batch: Batch, result: StepResult) -> None:
    """What the guards, the data's ledger and the record make of a step. Collective: every rank must call.

    Raises RunStopped where either has seen too much.
    """
    state, record = run.state, run.record
    try:
        run.guards.account(state.step, result.applied, result.sample_ids)
    except RewindAsked:
        run.keeper.rewind(state)
    run.ledger.account(batch)
    record.incidents(batch.incidents)
    if run.config.run.log_sample_ids:
        record.sample_ids(state.step, run.comm.all_gather(batch.sample_ids).tolist())
    if record.is_due(state.step):
        run.ledger.settle()
        row = state.numbers() | {"attempt": run.attempt} | run.meter.row(result)
        record.metrics(row, note=str(run.meter.verdict(row)))
        run.watchdog.tell_slow_ranks(record)


def evaluate(run: Run) -> None:
    """Student and teacher as they stand, on the sets of eval.data. Collective: every rank must call."""
    with run.meter.paused(), run.watchdog.during("evaluate"):
        if run.teacher is not None:
            run.teacher.publish()
        made = evaluate_engines(run.student, run.teacher, run.config, run.runtime, run.state.step)
        run.record.evaluation(rows.new(run.folder, made))  # a watch may have been here, or a kill in between


def evaluation_is_due(run: Run) -> bool:
    """Every eval.every_steps, and at the end."""
    every, step = run.config.eval.every_steps, run.state.step
    is_turn = step == run.total_steps or (every is not None and step % every == 0)
    return run.config.eval.data is not None and is_turn


def evaluation_was_forestalled(run: Run) -> bool:
    """Whether the run goes on from a step whose evaluation a stop came before. Collective: every rank must call."""
    weights = ["student", *(["teacher"] if run.teacher is not None else [])]

    def is_missing() -> bool:
        return bool(rows.missing(run.folder, run.state.step, sets_of(run.config), weights))

    return run.state.step > 0 and evaluation_is_due(run) and on_main(is_missing)
