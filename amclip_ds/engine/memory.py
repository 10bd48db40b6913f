"""Bytes of model state on one rank, by part, measured on engines that are built (plan/model_state.py predicts them)."""

import contextlib
import ctypes
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amclip_ds.engine import shards
from amclip_ds.engine.student import StudentEngine

if TYPE_CHECKING:
    from amclip_ds.engine.teacher import Teacher


def measured_model_state(student: StudentEngine, teacher: "Teacher | None") -> dict[str, float]:
    """Bytes of the tensor storages that each part occupies on this rank now, each storage counted once.

    Gradients are between backward and step, moments after the first step.
    """
    engine, optimizer = student.engine, student.engine.optimizer
    base = shards.base_optimizer(engine)
    weights = _weights(student.module)
    masters = [p for group in base.param_groups for p in group["params"]] if student.stage else []
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    moments = [value for state in base.state.values() for value in state.values() if torch.is_tensor(value)]
    moments += [staged for staged, _ in getattr(optimizer, "_muon_pending_momentum", {}).values()]
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


def begin_peak(device: torch.device) -> None:
    """Lets `peak_bytes` count from here: an earlier training of this program is none of the next one's.

    On a CPU what that one freed is given back first, since a run lets the allocator keep it (keep_freed_memory)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> float:
    """The most that this process has held since `begin_peak`: of the device's memory, or on a CPU of the machine's."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _peak_resident_bytes()


def _peak_resident_bytes() -> float:
    """The largest resident set: what a run on the CPU takes altogether."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def relative_difference(measured: float, expected: float) -> float:
    """|measured - expected| over the larger; 0 for two zeros."""
    largest = max(measured, expected)
    return abs(measured - expected) / largest if largest and math.isfinite(largest) else 0.0
