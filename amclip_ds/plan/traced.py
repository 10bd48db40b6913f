"""What an objective that is not known beforehand costs: it is built and run on torch's meta device, without data."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from amclip_ds.errors import UserError, in_one_line
from amclip_ds.method import method_of
from amclip_ds.model.amclip import Sizes as ModelSizes
from amclip_ds.model.features import FROZEN, Features, Seen
from amclip_ds.objectives import OBJECTIVES
from amclip_ds.objectives.base import start_of
from amclip_ds.plan.objectives import Cost, Part, Sizes
from amclip_ds.plan.shapes import Parameter


class MetaRanks:
    """One rank's side of collectives in a world of any size, for tensors that hold nothing."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_gather(self, x: Tensor) -> Tensor:
        """[B, ...] -> [world_size * B, ...]"""
        return x.repeat(self.world_size, *([1] * (x.dim() - 1)))

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """A copy."""
        return x * 1

    def ring_shift(self, x: Tensor) -> Tensor:
        """A copy."""
        return x * 1

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        """The same."""
        return lambda: x * 1


def parts_of(config: Any, width: int, grid: int, patch: int) -> dict[str, Part]:
    """plan.objectives.parts_of, of modules. Raises UserError for an objective that cannot be built."""
    sizes = ModelSizes(
        vision_width=width,
        text_width=config.model.text.width,
        embed_dim=config.model.embed_dim,
        grid=grid,
        patch=patch,
        context_length=config.model.text.context_length,
        vocab_size=config.model.text.vocab_size,
    )
    return {name: part_of(name, options, sizes) for name, options in method_of(config).objectives.items()}


def part_of(name: str, options: Any, sizes: ModelSizes) -> Part:
    """One objective."""
    kind = OBJECTIVES[name]
    try:
        with torch.device("meta"):
            module = kind(options, sizes)
    except Exception as error:  # of whoever wrote it
        raise UserError(f"loss.{name}: it cannot be built: {in_one_line(error, 200)}") from None
    found = {key: Parameter(tuple(p.shape), p.requires_grad) for key, p in module.named_parameters()}
    measure = functools.lru_cache(lambda of: trace(name, module, of, sizes))
    return Part(
        found,
        tuple(module.averaged),
        frozenset(kind.targets) - set(FROZEN),  # which another model gives
        frozenset(kind.features),
        text=module.text_pass,
        start=start_of(options),
        cost=lambda of: measure(of)[0],
        observed=lambda of: measure(of)[1],
    )


def trace(name: str, objective: Any, sizes: Sizes, model: ModelSizes) -> tuple[Cost, float]:
    """The cost of a rank's batch, and the floating point operations of its targets.

    Raises UserError where its forward reads values or shapes that a plan does not have.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32}[sizes.bytes]
    objective = objective.to(dtype)
    try:
        with torch.device("meta"):
            targets, observed = _observe(objective, sizes, model, dtype)
            batch = _features(objective, sizes, model, dtype, sizes.local, is_whole=True)
            whole = _measure(objective, lambda: objective(batch, targets, MetaRanks(sizes.world)))
            some = _features(objective, sizes, model, dtype, sizes.micro, is_whole=False)
            theirs = tuple(target[: sizes.micro] for target in targets)
            piece = _measure(objective, lambda: objective.per_sample(some, theirs))
    except Exception as error:  # of whoever wrote it
        raise UserError(
            f"loss.{name}: its cost cannot be traced without data: {type(error).__name__}: {in_one_line(error, 200)}"
        ) from None
    splits = -(-sizes.local // sizes.micro)
    return whole + Cost(piece.flops * splits, piece.saved, piece.transient), observed


def _observe(objective: Any, sizes: Sizes, model: ModelSizes, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], float]:
    B, N, D = sizes.local, sizes.teacher_patches, model.vision_width
    wanted = objective.targets
    rows = (B, sizes.teacher_looks) if sizes.teacher_looks else (B,)
    seen = Seen(
        torch.empty(*rows, D, dtype=dtype),
        torch.empty(*rows, N, D, dtype=dtype) if "patches" in wanted else None,
        torch.empty(*rows, N) if "scores" in wanted else None,
    )
    copies = nn.ModuleDict({part: getattr(objective, part) for part in objective.averaged})
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        targets = objective.observe(copies, seen, MetaRanks(sizes.world))
    V = len(objective.chosen_views or range(sizes.views))
    frozen = dict(zip(FROZEN, (torch.empty(B, V, model.embed_dim), torch.empty(B, model.embed_dim), torch.empty(B, 1))))
    targets = (*targets, *(held for name, held in frozen.items() if name in wanted))
    return tuple(targets), float(counter.get_total_flops())


def _features(
    objective: Any, sizes: Sizes, model: ModelSizes, dtype: torch.dtype, samples: int, is_whole: bool
) -> Features:
    """What the objective reads of some samples; is_whole: in its forward, else in per_sample."""
    views = objective.chosen_views or tuple(range(sizes.views))
    V, B, D, E = len(views), samples, model.vision_width, model.embed_dim
    wanted = objective.features

    def of(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, requires_grad=True)

    found = Features(cls=of(V, B, D), eot=of(B, model.text_width))
    if is_whole:
        if wanted & {"image_embeds", "text_embeds"}:
            found = found._replace(
                image_embeds=of(V, B, E, dtype=torch.float32),
                text_embeds=of(B, E, dtype=torch.float32),
                logit_scale=of(1, dtype=torch.float32),
                logit_bias=of(1, dtype=torch.float32),
            )
        return found
    if "patches" in wanted:
        found = found._replace(
            patches=tuple(of(B, sizes.kept[view], D) for view in views),
            keep_indices=tuple(torch.empty(B, sizes.kept[view], dtype=torch.long) for view in views),
        )
    if "pixels" in wanted:
        patches = of(B, model.grid**2, 3 * model.patch**2, dtype=torch.float32).detach()
        found = found._replace(pixels=(patches,) * V)
    if "tokens" in wanted:
        ids = torch.empty(B, sizes.text_tokens, dtype=torch.long)
        found = found._replace(tokens=of(B, sizes.text_tokens, model.text_width), token_ids=ids)
    if "vocabulary" in wanted:
        found = found._replace(vocabulary=of(model.vocab_size, model.text_width))
    return found


def _measure(module: nn.Module, run: Callable[[], dict[str, Tensor]]) -> Cost:
    """Operations of forward and backward, and what the forward keeps beside the parameters, each storage once."""
    held = {parameter.untyped_storage()._cdata: 0 for parameter in module.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            held[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # so that its address is not given away
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = [term.float().sum() for term in run().values() if term.requires_grad]  # some are recorded alone
        if terms:
            torch.stack(terms).sum().backward()
    return Cost(float(counter.get_total_flops()), float(sum(held.values())))
