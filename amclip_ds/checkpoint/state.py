"""What of a run is saved: views into the engines' own memory, so that saving reads and loading writes them in place."""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from amclip_ds.engine import shards
from amclip_ds.engine.shards import Shard
from amclip_ds.model.init import persistent_buffers

if TYPE_CHECKING:
    from amclip_ds.engine.student import StudentEngine
    from amclip_ds.engine.teacher import Teacher


@dataclass
class CheckpointState:
    """This rank's part of the run's state."""

    sharded: dict[str, dict[str, Shard]]
    """kind (master, frozen, ema, ema_frozen, exp_avg, ...) -> parameter -> this rank's elements"""
    shapes: dict[str, list[int]]
    """parameter -> shape, of all parameters of the model, the same on every rank"""
    whole: frozenset[str] = frozenset()
    """the kinds of which every rank holds everything: each writes its share of them"""
    replicated: dict[str, Tensor] = field(default_factory=dict)
    """buffers that are the same on every rank; rank 0's are saved"""
    small: dict[str, Any] = field(default_factory=dict)
    """counters, data cursor, guards: json-able, the same on every rank"""
    stage: int = 0
    precision: str = "float32"
    config: str = ""
    """the run's config.yaml"""
    hashes: dict[str, str] = field(default_factory=dict)
    """of the data's index, the tokenizer: what must not change unseen"""
    attempt: int = 0
    drift: list[str] = field(default_factory=list)
    """what was overridden since the run began"""


def of_engines(student: "StudentEngine", teacher: "Teacher | None", to_fill: bool = False) -> CheckpointState:
    """The tensors of the engines; the caller adds `small` and what describes the run. No communication.

    to_fill: for a load, which must also write what other ranks save (`shards.optimizer_shards`).
    """
    engine, named = student.engine, dict(student.module.named_parameters())
    frozen = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
    sharded = {"master": shards.master_shards(engine), "frozen": shards.forward_shards(frozen)}
    replicated = {f"student.{name}": buffer for name, buffer in persistent_buffers(student.module).items()}
    for name, moments in shards.optimizer_shards(engine, to_fill).items():
        for key, shard in moments.items():
            sharded.setdefault(key, {})[name] = shard
    whole = {"frozen"} if student.stage < 3 else set()
    if teacher is not None:
        sharded |= {"ema": teacher.ema_shards(), "ema_frozen": teacher.frozen_shards()}
        replicated |= {f"teacher.{name}": buffer for name, buffer in teacher.buffers().items()}
        if not any(hasattr(parameter, "ds_id") for parameter in teacher.placed.module.parameters()):
            whole.add("ema_frozen")
    return CheckpointState(
        sharded=sharded,
        shapes={name: list(getattr(p, "ds_shape", p.shape)) for name, p in named.items()},
        whole=frozenset(sharded if student.stage == 0 else whole),
        replicated=replicated,
        small={"optimizer": shards.optimizer_counters(engine)},
        stage=student.stage,
        precision=str(student.dtype).removeprefix("torch."),
    )


def ready_to_fill(student: "StudentEngine", teacher: "Teacher | None", has_moments: bool) -> CheckpointState:
    """`of_engines` for a load. has_moments: of the checkpoint: then the optimizer's state must exist to be filled."""
    if has_moments:
        shards.create_optimizer_state(student.engine)
    return of_engines(student, teacher, to_fill=True)


def bring_up_to_date(student: "StudentEngine", teacher: "Teacher | None", small: dict[str, Any]) -> None:
    """After the tensors were filled: what follows from them. Collective: every rank must call."""
    shards.set_optimizer_counters(student.engine, small["optimizer"])
    shards.refresh_from_masters(student.engine)
    if teacher is not None:
        teacher.publish()


def random_state() -> dict[str, Any]:
    """The process-wide generators, json-able. Nothing of a run reads them on purpose: its randomness is keyed."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, held = random.getstate()
    state = {
        "python": [version, list(words), held],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Writes what `random_state` read. Raises ValueError, KeyError or TypeError for what it did not write."""
    version, words, held = state["python"]
    random.setstate((version, tuple(words), held))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))
