"""Bytes of model state on a rank, by part, from a configuration alone (docs/memory.md derives the formula)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from amclip_ds.compat import COMPAT, TEXT_ENDS
from amclip_ds.engine.ds_config import is_flat, is_offloaded, is_teacher_sharded, read_ds_config, stage_of
from amclip_ds.optim import OptimConfig, parameter_groups
from amclip_ds.plan.shapes import Parameters
from amclip_ds.plan.work import Work

PARTS = ("parameters", "gradients", "masters", "moments", "ema", "teacher")
MOMENTS = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1}  # muon: of what adamw steps; its matrices have one
FP32 = 4
PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold, in elements


@dataclass(frozen=True)
class Sizes:
    """Elements of a model."""

    trained: int
    """of the student, with a gradient"""
    frozen: int
    small: int
    """of the trained ones, those that ZeRO-3 keeps whole on every rank"""
    teacher: int
    held: tuple[int, ...]
    """by rank: of the trained ones, those whose master it holds"""
    moments: tuple[int, ...]
    """by rank: bytes of the optimizer's state"""
    averaged: tuple[int, ...]
    """by rank: of the teacher, those whose fp32 master this rank holds"""
    reduced: tuple[int, ...]
    """by rank: of the gradients that this rank holds at the peak"""


def state_of(work: Work, rank: int | None = None) -> dict[str, float]:
    """Bytes in the device's memory, by part, at the peak of a step. Nothing is allocated.

    rank: None for the largest of every part over the ranks. What is offloaded is left out.
    Raises UserError for a ds_configs file that cannot be used.
    """
    ds = read_ds_config(work.config.engine)
    stage = stage_of(ds)
    flat = is_flat(ds, work.config.engine, work.config.optim.name)
    sizes = sizes_of(work, ds.get("zero_optimization", {}).get("stage3_param_persistence_threshold", PERSISTENT))
    held, averaged, reduced, moments = (
        max(of) if rank is None else of[rank] for of in (sizes.held, sizes.averaged, sizes.reduced, sizes.moments)
    )
    cut = work.world if stage == 3 else 1  # a rank holds 1/cut of the weights
    is_sharded = is_teacher_sharded(work.config.teacher.placement, stage, work.world)
    state = {
        "parameters": work.bytes * ((sizes.trained + sizes.frozen) / cut + (sizes.small if cut > 1 else 0)),
        "gradients": max(work.bytes * reduced, FP32 * held if flat else 0),
        "masters": FP32 * held if stage else 0.0,
        "moments": moments,
        "ema": FP32 * averaged,
        "teacher": work.bytes * sizes.teacher / (work.world if is_sharded else 1),
    }
    if is_offloaded(ds, "offload_optimizer"):
        state |= {"masters": 0.0, "moments": 0.0, "ema": 0.0, "gradients": 0.0 if stage >= 2 else state["gradients"]}
    if is_offloaded(ds, "offload_param"):
        state["parameters"] = 0.0
    return {part: float(size) for part, size in state.items()}


def sizes_of(work: Work, small: int) -> Sizes:
    """The model's elements. small: ZeRO-3's persistence threshold, in elements."""
    trained = {name: p.numel() for name, p in work.student.items() if p.requires_grad}
    teacher = {name: p.numel() for name, p in work.teacher.items()}
    mirrored = () if COMPAT[work.config.compat].averages_text_ends else TEXT_ENDS
    averaged = {name for name in teacher if not name.startswith(mirrored)} if mirrored else set(teacher)
    optim = work.config.optim
    starts = {name: part.start for name, part in work.parts.items()}
    of_optimizer = parameter_groups(work.student.items(), optim, starts)  # type: ignore[arg-type]
    groups = [group["names"] for group in of_optimizer]
    of_muon = [group["names"] for group in of_optimizer if group["use_muon"]]
    of_others = [group["names"] for group in of_optimizer if not group["use_muon"]]
    matrices = muon_bytes_by_rank(trained, of_muon, work.world, work.stage, work.bytes)
    others = held_by_rank(trained, of_others, work.world, work.stage)
    return Sizes(
        trained=sum(trained.values()),
        frozen=sum(p.numel() for p in work.student.values() if not p.requires_grad),
        small=sum(count for count in trained.values() if count <= small),
        teacher=sum(teacher.values()),
        held=held_by_rank(trained, groups, work.world, work.stage),
        moments=tuple(FP32 * num_moments(optim) * held + muon for held, muon in zip(others, matrices, strict=True)),
        averaged=averaged_by_rank(trained, averaged, groups, work.world, work.stage),
        reduced=reduced_by_rank(trained, groups, of_muon, work.world, work.stage),
    )


def num_moments(optim: OptimConfig) -> int:
    """How many tensors of a parameter's size an optimizer keeps for it, Muon's matrices aside."""
    return MOMENTS[optim.name] * (optim.momentum > 0 or optim.name != "sgd")


def muon_bytes_by_rank(
    trained: dict[str, int], groups: list[list[str]], world_size: int, stage: int, gradient_bytes: int
) -> tuple[int, ...]:
    """Bytes of the momentum of Muon's matrices that each rank holds: fp32 beside the masters at stages 0 and 3. At 1
    and 2 in the gradients' dtype, whole wherever some of a matrix is, and twice: a step works on a copy, which one
    that is skipped leaves behind."""
    if stage in (0, 3):
        return tuple(FP32 * held for held in held_by_rank(trained, groups, world_size, stage))
    held = [0] * world_size
    for name, rank, _ in _cut_in_runs(trained, groups, world_size):
        held[rank] += 2 * gradient_bytes * trained[name]
    return tuple(held)


def held_by_rank(trained: dict[str, int], groups: list[list[str]], world_size: int, stage: int) -> tuple[int, ...]:
    """Elements of the masters of these groups that each rank holds: whole at stage 0; an equal run of each group at 1
    and 2, an equal part of each tensor at 3, both rounded up."""
    if stage == 0:
        share = sum(trained[name] for names in groups for name in names)
    elif stage == 3:
        share = sum(math.ceil(trained[name] / world_size) for names in groups for name in names)
    else:
        share = sum(_run(trained, names, world_size) for names in groups)
    return (share,) * world_size


def averaged_by_rank(
    trained: dict[str, int], teacher: set[str], groups: list[list[str]], world_size: int, stage: int
) -> tuple[int, ...]:
    """Elements of the average that each rank holds: the average is where the masters are.

    Stage 0: everything everywhere. Stage 3 cuts every tensor evenly. Stages 1 and 2 cut each optimizer group, laid end
    to end, into equal runs: a rank may hold mostly heads that the teacher does not have, another one none of them.
    """
    whole = sum(count for name, count in trained.items() if name in teacher)
    if stage == 0:
        return (whole,) * world_size
    if stage == 3:
        return (math.ceil(whole / world_size),) * world_size
    held = [0] * world_size
    for name, rank, part in _cut_in_runs(trained, groups, world_size):
        if name in teacher:
            held[rank] += part
    return tuple(held)


def reduced_by_rank(
    trained: dict[str, int], groups: list[list[str]], of_muon: list[list[str]], world_size: int, stage: int
) -> tuple[int, ...]:
    """Elements of the gradients that each rank holds at the peak: all of them below stage 2, at stage 3 its share.

    Stage 2 keeps the whole gradient of every tensor of which a rank has some: one at the edge of two runs counts twice.
    So does stage 1 after the backward pass. of_muon: the groups whose updates are made then, beside those gradients.
    """
    whole = sum(trained.values())
    if stage in (0, 3):
        return (math.ceil(whole / world_size) if stage == 3 else whole,) * world_size
    held = [0] * world_size
    for kept in (groups, of_muon):
        for name, rank, _ in _cut_in_runs(trained, kept, world_size):
            held[rank] += trained[name]
    return tuple(held) if stage == 2 else tuple(max(whole, after) for after in held)


def _run(trained: dict[str, int], names: list[str], world_size: int) -> int:
    return math.ceil(sum(trained[name] for name in names) / world_size)


def _cut_in_runs(trained: dict[str, int], groups: list[list[str]], world_size: int) -> Iterator[tuple[str, int, int]]:
    """(tensor, rank, elements of it) where ZeRO lays each group end to end and cuts the line into equal runs.

    A tensor is on few ranks: only those are visited, so that 512 ranks cost no more than two.
    """
    for names in groups:
        run = _run(trained, names, world_size)
        start = 0
        for name in names:
            end = start + trained[name]
            for rank in range(start // run, min(world_size, -(-end // run))):
                part = min(end, (rank + 1) * run) - max(start, rank * run)
                if part > 0:
                    yield name, rank, part
            start = end


def trained_elements(parameters: Parameters) -> int:
    """Elements with a gradient."""
    return sum(p.numel() for p in parameters.values() if p.requires_grad)
