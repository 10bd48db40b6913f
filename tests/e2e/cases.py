"""What the end-to-end tests run on forked ranks: a command as a user types it, with what it printed."""

import contextlib
import io
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

from amclip_ds.cli import main


def command(argv: list[str]) -> tuple[int, str]:
    """Runs `amclip ARGV` in this process. Returns the exit code and everything it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(argv)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
    return code, printed.getvalue()


def blocked_loader(argv: list[str], rank: int, after: int) -> None:
    """The command, with a loader that gives nothing more on one rank after so many batches."""
    from amclip_ds.data.loader import TrainingData

    batches = TrainingData.batches

    def blocking(self: TrainingData, cursor: dict | None) -> Iterator:
        for number, batch in enumerate(batches(self, cursor)):
            while number >= after and os.environ["RANK"] == str(rank):
                time.sleep(1)
            yield batch

    TrainingData.batches = blocking  # type: ignore[method-assign]
    main(argv)


def endless_step(argv: list[str], rank: int, after: int) -> None:
    """The command, with a step that one rank never leaves."""
    from amclip_ds.masks import selection

    select, calls = selection.select, itertools.count()

    def endless(*words: Any, **named: Any) -> Any:
        while next(calls) >= after and os.environ["RANK"] == str(rank):
            time.sleep(1)
        return select(*words, **named)

    selection.select = endless
    main(argv)


def steps_of(runs: list[list[str]]) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of each step of short runs (METHOD-SIZE and settings), one run after another.

    By the parts that `amclip train` is made of, without its folder, pictures and checkpoints: a matrix of hundreds of
    runs needs a launch for each world alone.
    """
    from contextlib import closing

    from amclip_ds import config as settings
    from amclip_ds import run as parts
    from amclip_ds.distill import FrozenTeacher
    from amclip_ds.method import method_of
    from amclip_ds.optim import Schedules
    from amclip_ds.ranks import runtime as engine_runtime
    from amclip_ds.ranks.collectives import DistributedComm
    from amclip_ds.resilience.guards import Guards
    from amclip_ds.step import train_step

    runtime = engine_runtime.start()
    comm, found = DistributedComm(), []
    for recipe, *words in runs:
        config = settings.load(recipe, words)
        method, steps = method_of(config), int(config.run.steps or 0)
        plan = settings.plan_batch(config.batch, runtime.world_size)
        student, teacher = parts.build_engines(config, method, runtime)
        frozen = FrozenTeacher(config.distill.teacher, config.model, runtime.device) if config.distill.teacher else None
        schedules, guards = Schedules(config.optim, config.teacher, steps), Guards(config.guards, lambda *row: None)
        rows, updates = [], 0
        with closing(parts.open_data(config, method, runtime)) as data:
            for batch in itertools.islice(data.batches(None), steps):
                made = train_step(batch, student, teacher, schedules, updates, method, comm, plan.micro, guards, frozen)
                updates += int(made.applied)
                rows.append((float(comm.all_reduce_sum(made.loss) / comm.world_size), float(made.grad_norm)))
        found.append(rows)
    engine_runtime.stop(runtime)
    return found
