"""A recipe's steps with compiled towers and every exact saving, beside the same steps with neither.

What the first run keeps of its tokens the others keep too: else a near tie of two priorities, which the last digit
decides, would part the runs; for the same reason heads have no kinks (adr/0091). What they would have kept is compared.
"""

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.data.batch import Batch
from amclip_ds.engine import compile as compiling
from amclip_ds.masks import MASKS, MaskConfig, MaskInputs, options_of
from amclip_ds.masks import selection as selecting
from amclip_ds.model.savings import Savings
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.runtime import Runtime
from tests.distributed.cases import without_kinks
from tests.distributed.cases_engine import taken
from tests.e2e.short_runs import ShortRun

BATCH = 64  # the recipes' own: of fewer samples the heads' batch norm amplifies rounding
PLAIN = [f"engine.savings.{item.name}=false" for item in dataclasses.fields(Savings)] + ["engine.compile=none"]
COMPILED = ["engine.compile=tower"]
MIXED = 0.03  # of its neighbour, in each feature of the twin's tower


class Choice(NamedTuple):
    """One call of select. B rows are views x samples."""

    kept: Tensor
    """[B, K]"""
    priority: Tensor
    """[B, U]"""
    config: MaskConfig
    inputs: MaskInputs


@dataclass
class Choices:
    """What a run keeps of its tokens, by step and call; repeats: another run's, which are taken instead of its own."""

    repeats: "Choices | None" = None
    steps: list[list[Choice]] = field(default_factory=list)
    rows: int = 0
    """that chose"""
    flips: int = 0
    """of these, which would have chosen otherwise than the run that they repeat"""
    gap: float = 0.0
    """the largest difference of the priorities of two units that changed places, over the row's largest priority"""

    @contextmanager
    def watching(self) -> Iterator[None]:
        select = selecting.select

        def watched(config: MaskConfig, inputs: MaskInputs) -> Tensor | None:
            own = select(config, inputs)
            return own if own is None else self._take(own, config, inputs)

        selecting.select = watched
        try:
            yield
        finally:
            selecting.select = select

    def _take(self, own: Tensor, config: MaskConfig, inputs: MaskInputs) -> Tensor:
        priority = MASKS[config.strategy].priority(inputs, options_of(config)).float()
        self.steps[-1].append(Choice(own.clone(), priority, config, inputs))
        if self.repeats is None:
            return own
        theirs, their_priority = self.repeats.part(len(self.steps) - 1, len(self.steps[-1]) - 1, own.shape[0])
        self.rows += own.shape[0]
        for row in (own != theirs).any(-1).nonzero().flatten().tolist():
            units = [units_of(kept[row], inputs.grid, config.unit) for kept in (theirs, own)]
            values = their_priority[row]
            apart = [abs(float(values[a] - values[b])) for a in units[0] - units[1] for b in units[1] - units[0]]
            self.flips += 1
            self.gap = max([self.gap, *(value / float(values.abs().max()) for value in apart)])
        return theirs

    def part(self, step: int, call: int, rows: int) -> tuple[Tensor, Tensor]:
        """Kept tokens and priorities of one call of a run that takes its batch whole or in pieces."""
        piece, call = divmod(call, len(self.steps[step]))
        chosen = self.steps[step][call]
        views = chosen.inputs.num_views
        samples = slice(piece * rows // views, (piece + 1) * rows // views)
        kept, priority = (
            whole.unflatten(0, (views, -1))[:, samples].flatten(0, 1) for whole in (chosen.kept, chosen.priority)
        )
        return kept, priority


def units_of(tokens: Tensor, grid: int, unit: int) -> set[int]:
    return {t // grid // unit * (grid // unit) + t % grid // unit for t in tokens.tolist()}


class Followed(NamedTuple):
    """What one run gave."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """of the first step, fp32 sums over its pieces"""
    choices: Choices
    seconds: float
    """of its steps, with what they compile"""
    towers: list[str]
    """of student and teacher: plain, compiled, or why they failed"""
    warned: list[str]


def against_plain(
    recipe: str, words: list[str], backend: str = "inductor", is_bf16: bool = False, mixed: bool = False
) -> dict[str, Any]:
    """The same steps on one rank, without savings and compiler, texts padded to the whole context; and with every
    saving and compiled towers. is_bf16: also the first in two pieces, which sums in another order, and its first
    gradients in fp32.

    words: settings, with run.steps. mixed: the compiled image tower's features are not quite its own.
    Returns the losses of the plain run; the norms of its gradients (in bf16 of those in fp32) over the largest one; of
    compiled, and pieces, {losses, cosines by tensor, flips, rows, gap, seconds, towers, warned}; and in bf16 how far
    each one's gradients are from those in fp32, over their norm, by tensor.
    """
    compiling.BACKEND = backend
    runtime = engine_runtime.start()
    words = [*words, f"batch.global_size={BATCH}"]
    whole, half = [f"batch.per_gpu={BATCH}"], [f"batch.per_gpu={BATCH // 2}"]
    plain = follow(recipe, [*words, *PLAIN, *whole], runtime, padded)
    others = {"compiled": follow(recipe, [*words, *COMPILED, *whole], runtime, repeats=plain.choices, mixed=mixed)}
    if is_bf16:
        others["pieces"] = follow(recipe, [*words, *PLAIN, *half], runtime, padded, plain.choices)
    exact: dict[str, Tensor] = {}
    if is_bf16:
        fp32 = [word for word in words if not word.startswith("engine.deepspeed=")] + [
            "engine.deepspeed=zero1_fp32.json"
        ]
        exact = follow(recipe, [*fp32, *PLAIN, *whole], runtime, padded, plain.choices, last_step=1).gradients
    engine_runtime.stop(runtime)
    reference = exact or plain.gradients
    largest = max(float(gradient.norm()) for gradient in reference.values())
    return {
        "losses": plain.losses,
        "seconds": plain.seconds,
        "errors": {
            name: {n: float((run.gradients[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in exact.items()}
            for name, run in ((others | {"plain": plain}).items() if is_bf16 else ())
        },
        "norms": {name: float(gradient.norm()) / largest for name, gradient in reference.items()},
        **{
            name: {
                "losses": run.losses,
                "cosines": {n: cosine(gradient, run.gradients[n]) for n, gradient in plain.gradients.items()},
                "flips": run.choices.flips,
                "rows": run.choices.rows,
                "gap": run.choices.gap,
                "seconds": run.seconds,
                "towers": run.towers,
                "warned": run.warned,
            }
            for name, run in others.items()
        },
    }


def at_same_weights(recipe: str, words: list[str], backend: str = "inductor", mixed: bool = False) -> dict[str, Any]:
    """(loss, gradient norm) of each step, plain and compiled as in against_plain, where the compiled run begins each
    step with the plain one's weights, average and statistics: what a step changes is not amplified by the next ones.

    Heads are the recipe's own. Returns {plain, compiled, flips, gap, towers, warned}.
    """
    compiling.BACKEND = backend
    runtime = engine_runtime.start()
    words = [*words, f"batch.global_size={BATCH}", f"batch.per_gpu={BATCH}"]
    choices = [Choices()]
    choices.append(Choices(choices[0]))
    rows: list[list[tuple[float, float]]] = [[], []]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain, compiled = runs = [ShortRun(recipe, [*words, *more], runtime) for more in (PLAIN, COMPILED)]
        if mixed:
            mix(compiled.student.module.vision)
        for batch in plain.batches():
            take_weights(compiled, plain)
            ready = (padded(batch, plain.config.model.text.context_length), batch)
            for run, chosen, own, found in zip(runs, choices, ready, rows):
                chosen.steps.append([])
                with chosen.watching():
                    found.append(run.step(own))
    engine_runtime.stop(runtime)
    return {
        "plain": rows[0],
        "compiled": rows[1],
        "flips": choices[1].flips,
        "gap": choices[1].gap,
        "towers": towers_of(compiled),
        "warned": [str(warning.message) for warning in caught if "engine.compile" in str(warning.message)],
    }


def take_weights(run: ShortRun, other: ShortRun) -> None:
    """What the next step's forwards of a run read becomes another run's."""
    run.student.module.load_state_dict(other.student.module.state_dict())
    if run.teacher is not None and other.teacher is not None:
        run.teacher.placed.module.load_state_dict(other.teacher.placed.module.state_dict())


def towers_of(run: ShortRun) -> list[str]:
    """Of student and teacher: plain, compiled, or why they failed."""
    models: list[Any] = [run.student.module, *([run.teacher.placed.module] if run.teacher else [])]
    return [taken(part) for model in models for part in (model.vision.through_blocks, model.text.pooled)]


def follow(
    recipe: str,
    words: list[str],
    runtime: Runtime,
    prepare: Callable[[Batch, int], Batch] = lambda batch, context: batch,
    repeats: Choices | None = None,
    mixed: bool = False,
    last_step: int | None = None,
) -> Followed:
    """The steps of a run of the recipe's own start and batches, all or up to one."""
    torch._dynamo.reset()
    choices, losses = Choices(repeats), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with without_kinks():
            run = ShortRun(recipe, words, runtime)
        if mixed:
            mix(run.student.module.vision)
        gradients, hooks = watched_gradients(run)
        began = time.monotonic()
        with choices.watching():
            for batch in itertools.islice(run.batches(), last_step):
                choices.steps.append([])
                losses.append(run.step(prepare(batch, run.config.model.text.context_length))[0])
                for hook in hooks:
                    hook.remove()
                hooks = []
        seconds = time.monotonic() - began
    warned = [str(warning.message) for warning in caught if "engine.compile" in str(warning.message)]
    return Followed(losses, gradients, choices, seconds, towers_of(run), warned)


def padded(batch: Batch, context: int) -> Batch:
    """The batch with its texts as long as the context."""
    texts = {name: getattr(batch, name) for name in ("token_ids", "masked_ids", "cloze_ids")}
    longer = {name: F.pad(ids, (0, context - ids.shape[1])) if ids is not None else None for name, ids in texts.items()}
    return dataclasses.replace(batch, **longer)  # type: ignore[arg-type]


def watched_gradients(run: ShortRun) -> tuple[dict[str, Tensor], list[Any]]:
    """What autograd gives each trained parameter, summed over the backward passes, until the hooks are removed."""
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        found[name] = found[name] + gradient.float() if name in found else gradient.float().clone()

    named = [(name, p) for name, p in run.student.module.named_parameters() if p.requires_grad]
    return found, [p.register_hook(lambda gradient, name=name: add(name, gradient)) for name, p in named]


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two gradients; 1 where both are zero."""
    norms = float(one.norm()) * float(other.norm())
    if not norms:
        return float(not float(one.norm()) and not float(other.norm()))
    return float((one.flatten().double() @ other.flatten().double()) / norms)


def mix(vision: Any) -> None:
    """A compiled tower that is not quite right: a little of its neighbour is in each of a token's features."""
    through_blocks = vision.through_blocks

    def wrong(*given: Any) -> tuple[Tensor, Tensor | None]:
        tokens, scores = through_blocks(*given)
        return tokens + MIXED * tokens.roll(1, dims=-1), scores

    wrong.failed = through_blocks.failed  # type: ignore[attr-defined]
    vision.through_blocks = wrong
