"""Bytes of model state on one rank, by part: from a config alone, and measured on standing engines.

docs/memory.md derives the formula and holds it against the measurement. Activations, reduction buckets and the
library's workspace come on top.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from amclip_ds import method
from amclip_ds.engine import shards
from amclip_ds.engine.ds_config import EngineConfig, is_offloaded, read_ds_config, stage_of
from amclip_ds.engine.student import StudentEngine
from amclip_ds.model.amclip import AClip
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder
from amclip_ds.optim import OptimConfig, parameter_groups

if TYPE_CHECKING:
    from amclip_ds.teacher import Teacher, TeacherConfig

PARTS = ("parameters", "gradients", "masters", "moments", "ema", "teacher")
MOMENTS = {"adamw": 2, "lamb": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0}
FP32 = 4


class Settings(method.Settings, Protocol):
    """What decides the size of the state: a TrainConfig has it all."""

    optim: OptimConfig
    engine: EngineConfig
    teacher: "TeacherConfig"


@dataclass(frozen=True)
class Sizes:
    """Elements of a model."""

    trained: int
    """of the student, with a gradient"""
    frozen: int
    small: int
    """of the trained ones, those that ZeRO-3 keeps whole on every rank"""
    teacher: int
    averaged: tuple[int, ...]
    """by rank: of the teacher, those whose fp32 master this rank holds"""
    reduced: tuple[int, ...]
    """by rank: of the gradients that this rank holds at the peak"""


def model_state_of(config: Settings, world_size: int, rank: int | None = None) -> dict[str, float]:
    """Bytes in the device's memory, by part, at the peak of a step. Nothing is allocated.

    rank: None for the largest of every part over the ranks. What is offloaded is left out.
    Raises UserError for a ds_configs file that cannot be used.
    """
    ds = read_ds_config(config.engine)
    zero = ds.get("zero_optimization", {})
    stage = stage_of(ds)
    sizes = sizes_of(config, world_size, stage, small=zero.get("stage3_param_persistence_threshold", 100_000))
    averaged, reduced = (max(of) if rank is None else of[rank] for of in (sizes.averaged, sizes.reduced))
    width = 2 if ds.get("bf16", {}).get("enabled") else FP32
    moments = MOMENTS[config.optim.name] * (config.optim.momentum > 0 or config.optim.name != "sgd")
    own = world_size if stage else 1  # a rank holds 1/own of masters, moments and average
    cut = world_size if stage == 3 else 1  # and 1/cut of the weights
    teacher_cut = world_size if config.teacher.placement == "sharded" or (
        config.teacher.placement == "auto" and stage == 3
    ) else 1  # fmt: skip
    state = {
        "parameters": width * ((sizes.trained + sizes.frozen) / cut + (sizes.small if cut > 1 else 0)),
        "gradients": width * reduced,
        "masters": FP32 * sizes.trained / own if stage else 0.0,
        "moments": FP32 * moments * sizes.trained / own,
        "ema": FP32 * averaged,
        "teacher": width * sizes.teacher / teacher_cut,
    }
    if is_offloaded(ds, "offload_optimizer"):
        state |= {"masters": 0.0, "moments": 0.0, "ema": 0.0, "gradients": 0.0 if stage >= 2 else state["gradients"]}
    if is_offloaded(ds, "offload_param"):
        state["parameters"] = 0.0
    return state


def sizes_of(config: Settings, world_size: int, stage: int, small: int) -> Sizes:
    """Counts a config's models without allocating them. small: ZeRO-3's persistence threshold, in elements."""
    chosen = method.method_of(config)
    with torch.device("meta"):
        student = AClip(config.model, builder(chosen.objectives))
    trained = {name: p.numel() for name, p in student.named_parameters() if p.requires_grad}
    teacher: dict[str, int] = {}
    if chosen.needs_teacher:
        with torch.device("meta"):
            module = TeacherModel(config.model, builder(chosen.objectives))
        teacher = {name: p.numel() for name, p in module.named_parameters()}
    groups = [group["names"] for group in parameter_groups(student.named_parameters(), config.optim)]
    return Sizes(
        trained=sum(trained.values()),
        frozen=sum(p.numel() for p in student.parameters() if not p.requires_grad),
        small=sum(count for count in trained.values() if count <= small),
        teacher=sum(teacher.values()),
        averaged=averaged_by_rank(trained, set(teacher), groups, world_size, stage),
        reduced=reduced_by_rank(trained, groups, world_size, stage),
    )


def averaged_by_rank(
    trained: dict[str, int], teacher: set[str], groups: list[list[str]], world_size: int, stage: int
) -> tuple[int, ...]:
    """Elements of the average that each rank holds: the average lies where the masters lie.

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


def reduced_by_rank(trained: dict[str, int], groups: list[list[str]], world_size: int, stage: int) -> tuple[int, ...]:
    """Elements of the gradients that each rank holds at the peak: all of them below stage 2, at stage 3 its share.

    Stage 2 keeps the whole gradient of every tensor of which a rank has some: one at the edge of two runs counts twice.
    """
    whole = sum(trained.values())
    if stage != 2:
        return (math.ceil(whole / world_size) if stage == 3 else whole,) * world_size
    held = [0] * world_size
    for name, rank, _ in _cut_in_runs(trained, groups, world_size):
        held[rank] += trained[name]
    return tuple(held)


def _cut_in_runs(trained: dict[str, int], groups: list[list[str]], world_size: int) -> Iterator[tuple[str, int, int]]:
    """(tensor, rank, elements of it) where ZeRO lays each group end to end and cuts the line into equal runs."""
    for names in groups:
        run = math.ceil(sum(trained[name] for name in names) / world_size)
        start = 0
        for name in names:
            for rank in range(world_size):
                part = min(start + trained[name], (rank + 1) * run) - max(start, rank * run)
                if part > 0:
                    yield name, rank, part
            start += trained[name]


def measured_model_state(student: StudentEngine, teacher: "Teacher | None") -> dict[str, float]:
    """Bytes of the tensor storages that each part occupies on this rank now, each storage counted once.

    Gradients stand between backward and step, moments after the first step.
    """
    engine, optimizer = student.engine, student.engine.optimizer
    base = shards.base_optimizer(engine)
    weights = _weights(student.module)
    masters = [p for group in base.param_groups for p in group["params"]] if student.stage else []
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    moments = [value for state in base.state.values() for value in state.values() if torch.is_tensor(value)]
    seen: set[int] = set()
    return {
        "parameters": storage_bytes(weights, seen),
        "masters": storage_bytes(masters, seen),
        "moments": storage_bytes(moments, seen),
        "gradients": storage_bytes(_gradients(engine, masters), seen),
        "ema": storage_bytes([shard.tensor for shard in teacher.ema_shards().values()] if teacher else [], seen),
        "teacher": storage_bytes(_weights(teacher.placed.module) if teacher else [], seen),
    }


def _weights(module: nn.Module) -> list[Tensor]:
    found = [p.data for p in module.parameters()]
    return found + [p.ds_tensor.data for p in module.parameters() if hasattr(p, "ds_tensor")]


def _gradients(engine: Any, masters: list[Tensor]) -> list[Tensor]:
    """Wherever DeepSpeed may hold them: on the parameters, in its partitions, on the masters."""
    optimizer = engine.optimizer
    found: list[Any] = [p.grad for p in [*engine.module.parameters(), *masters]]
    for held in ("averaged_gradients", "all_grad_tensors"):
        for tensors in getattr(optimizer, held, {}).values():
            found += [tensors] if torch.is_tensor(tensors) else list(tensors or [])
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    return [tensor for tensor in found if torch.is_tensor(tensor)]


def storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> float:
    """Sum of the tensors' storages; those in `seen` are left out, the others are added to it."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return float(total)


def peak_resident_bytes() -> float:
    """The largest resident set this process has had (Linux): what a run on the CPU takes altogether."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def relative_difference(measured: float, expected: float) -> float:
    """|measured - expected| over the larger; 0 for two zeros."""
    largest = max(measured, expected)
    return abs(measured - expected) / largest if largest and math.isfinite(largest) else 0.0
