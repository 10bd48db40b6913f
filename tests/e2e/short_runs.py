"""Short runs of recipes by the parts that `amclip train` is made of, without its folder, pictures and checkpoints: a
matrix of hundreds of runs needs a launch for each world alone."""

import itertools
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amclip_ds import config as settings
from amclip_ds import run as parts
from amclip_ds.data.batch import Batch
from amclip_ds.distill import FrozenTeacher
from amclip_ds.engine.shards import optimizer_shards
from amclip_ds.method import method_of
from amclip_ds.optim import Schedules
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm, gather_objects
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.resilience.guards import Guards
from amclip_ds.step import train_step
from tests.distributed.equivalence import WITHOUT_GRADIENT, distance

SUMS_THAT_CANCEL = r"logit_scale|vision\.norm\.bias"
"""Their gradients can be small differences of large sums over the rows and columns of the logits: in second stages
fp32's rounding of those sums was up to 1.2e-4 of them."""


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

    def first_gradients(self) -> dict[str, Tensor]:
        """Each parameter's gradient of the only step so far, whole, from the optimizer's first moment, which is the
        clipped gradient times one number. Collective: every rank must call."""
        own = []
        for name, moments in optimizer_shards(self.student.engine).items():
            shard = moments["exp_avg"] if "exp_avg" in moments else moments["momentum_buffer"]
            own.append((name, shard.start, shard.numel, shard.tensor.detach().clone()))
        found: dict[str, Tensor] = {}
        for name, start, numel, part in itertools.chain.from_iterable(gather_objects(own)):
            found.setdefault(name, torch.full((numel,), torch.nan))[start : start + len(part)] = part.flatten()
        return found


def steps_of(runs: list[list[str]], folder: str) -> list[tuple[list[tuple[float, float]], float]]:
    """Of short runs (METHOD-SIZE and settings), one after another: (loss, gradient norm) of each step; and how far the
    first step's gradients are from those of the first run of this recipe and stage, which are kept in the folder: the
    largest difference of an element, as a share of its tensor's largest."""
    runtime, found = engine_runtime.start(), []
    for recipe, *words in runs:
        run = ShortRun(recipe, words, runtime)
        rows, gradients = [], {}
        for batch in run.batches():
            rows.append(run.step(batch))
            gradients = gradients or run.first_gradients()
        kept = Path(folder, f"{recipe}-{run.student.engine.zero_optimization_stage()}.safetensors")
        if runtime.rank == 0 and not kept.exists():
            save_file(gradients, kept)
        found.append((rows, apart(load_file(kept), gradients) if runtime.rank == 0 else 0.0))
    engine_runtime.stop(runtime)
    return found


def apart(reference: dict[str, Tensor], gradients: dict[str, Tensor]) -> float:
    """The largest difference of an element, as a share of its tensor's largest, of SUMS_THAT_CANCEL a hundredth of it;
    infinite where one is not a number."""
    assert reference.keys() == gradients.keys()
    named = [name for name in reference if not re.fullmatch(WITHOUT_GRADIENT, name)]
    weights = {name: 0.01 if re.fullmatch(SUMS_THAT_CANCEL, name) else 1.0 for name in named}
    return max(distance(reference[name], gradients[name]) * weights[name] for name in named)
