"""Short runs of recipes by the parts that `amclip train` is made of, without its folder, pictures and checkpoints: a
matrix of hundreds of runs needs a launch for each world alone."""

import itertools
from collections.abc import Iterator
from contextlib import closing

from amclip_ds import config as settings
from amclip_ds import run as parts
from amclip_ds.data.batch import Batch
from amclip_ds.distill import FrozenTeacher
from amclip_ds.method import method_of
from amclip_ds.optim import Schedules
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.resilience.guards import Guards
from amclip_ds.step import train_step


class ShortRun:
    """One rank's engines of a recipe, and its steps. words: settings, with run.steps."""

    def __init__(self, recipe: str, words: list[str], runtime: Runtime) -> None:
        self.config = settings.load(recipe, words)
        self.method, self.runtime, self.comm = method_of(self.config), runtime, DistributedComm()
        self.plan = settings.plan_batch(self.config.batch, runtime.world_size)
        self.student, self.teacher = parts.build_engines(self.config, self.method, runtime)
        teacher = self.config.distill.teacher
        self.frozen = FrozenTeacher(teacher, self.config.model, runtime.device) if teacher else None
        self.num_steps, self.updates = int(self.config.run.steps or 0), 0
        self.schedules = Schedules(self.config.optim, self.config.teacher, self.num_steps)
        self.guards = Guards(self.config.guards, lambda *row: None)

    def batches(self) -> Iterator[Batch]:
        """This rank's part of each step's batch."""
        with closing(parts.open_data(self.config, self.method, self.runtime)) as data:
            yield from itertools.islice(data.batches(None), self.num_steps)

    def step(self, batch: Batch) -> tuple[float, float]:
        """Loss, a mean over the ranks, and gradient norm. Collective: every rank must call."""
        made = train_step(
            batch,
            self.student,
            self.teacher,
            self.schedules,
            self.updates,
            self.method,
            self.comm,
            self.plan.micro,
            self.guards,
            self.frozen,
        )
        self.updates += int(made.applied)
        return float(self.comm.all_reduce_sum(made.loss) / self.comm.world_size), float(made.grad_norm)


def steps_of(runs: list[list[str]]) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of each step of short runs (METHOD-SIZE and settings), one run after another."""
    runtime, found = engine_runtime.start(), []
    for recipe, *words in runs:
        run = ShortRun(recipe, words, runtime)
        found.append([run.step(batch) for batch in run.batches()])
    engine_runtime.stop(runtime)
    return found
