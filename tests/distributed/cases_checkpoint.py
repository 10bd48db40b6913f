"""What the checkpoint tests run on forked ranks: real engines over a fixed stream, saved and loaded."""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amclip_ds.checkpoint import CheckpointConfig, load
from amclip_ds.checkpoint import state as state_module
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import Saver
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.compat import COMPAT
from amclip_ds.data.batch import Batch
from amclip_ds.engine import shards
from amclip_ds.engine.ds_config import EngineConfig
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.masks import MaskConfig
from amclip_ds.method import Method
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig, TeacherConfig, TextConfig, VisionConfig
from amclip_ds.objectives import chosen
from amclip_ds.optim import OptimConfig, Schedules
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm
from amclip_ds.resilience.config import GuardsConfig
from amclip_ds.resilience.guards import Guards
from amclip_ds.step import train_step
from tests.distributed.batches import local_part, made_batch

GLOBAL_BATCH, GRID, TOTAL = 12, 4, 40
HEADS = {"hidden_dim": 37, "output_dim": 13}


def odd_model() -> ModelConfig:
    """Widths that no world divides, a parameter of one element, several parameter groups."""
    return ModelConfig(
        vision=VisionConfig(
            name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=30, depth=2, heads=2, mlp_ratio=1.5
        ),
        text=TextConfig(
            width=26,
            depth=1,
            heads=2,
            mlp_ratio=1.5,
            vocab_size=101,
            eos_token_id=99,
            context_length=16,
            activation="gelu",
        ),
        embed_dim=23,
    )


def stream(step: int, rank: int, world_size: int) -> Batch:
    """This rank's rows of a step's samples, which are the same in every world."""
    g = torch.Generator().manual_seed(7000 + step)
    tokens = torch.randint(1, 98, (GLOBAL_BATCH, 16), generator=g)
    tokens[:, 10], tokens[:, 11:] = 99, 0
    views = torch.randn(2, GLOBAL_BATCH, 3, 32, 32, generator=g)
    teacher = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=g)
    noise = torch.rand(2, GLOBAL_BATCH, (GRID // 2) ** 2, generator=g)
    return local_part(made_batch(views, teacher, noise, tokens), rank, world_size)


@dataclass
class Rig:
    """A small run: engines, schedules, counters."""

    ds: str
    strategy: str = "attentive"
    micro: int = GLOBAL_BATCH
    optim: str = "adamw"
    placement: str = "auto"
    layer_decay: float = 0.9
    updates: int = 0

    def __post_init__(self) -> None:
        self.runtime = engine_runtime.start(deterministic=True)
        self.comm, self.ranks = DistributedComm(), Ranks(timeout_s=60)
        objectives = chosen(LossConfig(), HeadsConfig(**HEADS))
        optim = OptimConfig(name=self.optim, lr=0.01, warmup_steps=5, layer_decay=self.layer_decay, weight_decay=0.1)
        teacher = TeacherConfig(momentum=0.9, final_momentum=0.99, placement=self.placement)
        self.student = StudentEngine(
            odd_model(), objectives, optim, EngineConfig(deepspeed=self.ds), seed=0, runtime=self.runtime
        )
        self.teacher = Teacher(teacher, odd_model(), objectives, student=self.student, device=self.runtime.device)
        self.method = Method(objectives, (MaskConfig(strategy=self.strategy),) * 2, GRID, COMPAT["paper"])
        self.guards = Guards(GuardsConfig())
        self.schedules = Schedules(optim, teacher, TOTAL)

    def train(self, steps: int) -> list[tuple[str, ...]]:
        """Steps on; per step the loss, gradient norm, learning rate, momentum and random draws, every bit of them."""
        rows = []
        for _ in range(steps):
            batch = stream(self.updates, self.runtime.rank, self.runtime.world_size).to(self.runtime.device)
            result = train_step(
                batch,
                self.student,
                self.teacher,
                self.schedules,
                self.updates,
                self.method,
                self.comm,
                self.micro,
                self.guards,
            )
            assert result.applied
            self.updates += 1
            mean = self.comm.all_reduce_sum(result.loss.clone().double()) / self.comm.world_size
            on_device = torch.rand(1, device=self.runtime.device).item()  # draws that only a restored state repeats
            drawn = f"{torch.rand(1).item()} {on_device} {np.random.rand()} {random.random()}"
            exact = [value.hex() for value in (float(mean), float(result.grad_norm), result.lr, result.momentum)]
            rows.append((*exact, drawn))
        return rows

    def state(self) -> CheckpointState:
        state = state_module.of_engines(self.student, self.teacher)
        cursor = {"epoch": 3, "step": self.updates}
        run = {"step": self.updates, "updates": self.updates, "samples_seen": self.updates * GLOBAL_BATCH, "epoch": 3}
        state.small |= {"run": run | {"cursor": cursor, "guards": self.guards.state_dict()}}
        state.config = "run: {seed: 0}\n"
        return state

    def save(self, folder: Path, asynchronous: bool = True) -> None:
        config = CheckpointConfig(asynchronous=asynchronous, keep_last=100)
        with Saver(folder, config, self.ranks, say=lambda text: None) as saver:
            saver.save(self.updates, self.state(), wait=True)

    def load(self, folder: Path, forget: tuple[str, ...] = ()) -> None:
        """forget: kinds of state that a broken load leaves as they are; `counters`: the optimizer's step."""
        found = load.find(folder, "auto", False, self.ranks)
        assert found is not None
        state = state_module.ready_to_fill(self.student, self.teacher, bool(found.moments))
        for kind in forget:
            if kind in state.sharded:  # filled, but not in place
                copies = {n: replace(s, tensor=s.tensor.clone()) for n, s in state.sharded[kind].items()}
                state.sharded[kind] = copies
        if "buffers" in forget:
            state.replicated = {}
        load.fill(found, state, self.ranks)
        small = found.small | ({"optimizer": {"step": 0.0}} if "counters" in forget else {})
        state_module.bring_up_to_date(self.student, self.teacher, small)
        self.updates = found.small["run"]["updates"]

    def digest(self) -> dict[str, str]:
        """sha256 of every tensor of the state, whole; what the forward reads; counters. The same on every rank."""
        state = self.state()
        pieces = self.ranks.gather(
            {
                (kind, name): (shard.start, shard.numel, shard.tensor.detach().float().cpu().clone())
                for kind, held in state.sharded.items()
                for name, shard in held.items()
            }
        )
        whole: dict[tuple[str, str], torch.Tensor] = {}
        for one in pieces:
            for key, (start, numel, tensor) in one.items():
                whole.setdefault(key, torch.full((numel,), float("nan")))[start : start + tensor.numel()] = tensor
        digest = {f"{kind} {name}": _sha(tensor) for (kind, name), tensor in whole.items()}
        digest |= {f"buffer {name}": _sha(buffer.float()) for name, buffer in state.replicated.items()}
        digest["counters"] = repr(sorted(state.small["optimizer"].items())) + repr(state.small["run"]["cursor"])
        return digest

    def stop(self) -> None:
        engine_runtime.stop(self.runtime)


def _sha(tensor: torch.Tensor) -> str:
    assert not tensor.isnan().any()
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]


def run(
    folder: str,
    steps: int,
    *,
    resume: bool = False,
    save: bool = True,
    forget: tuple[str, ...] = (),
    go_on: int = 0,
    asynchronous: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """[loads,] trains `steps`, [saves,] trains `go_on` more. Returns rows and digests (after load, at the end)."""
    rig = Rig(**settings)
    seed = rig.runtime.rank + (999 if resume else 0)  # a resumed rank must not draw right by chance
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    result: dict[str, Any] = {}
    if resume:
        rig.load(Path(folder), forget)
        result["loaded"] = rig.digest()
    result["rows"] = rig.train(steps)
    if save:
        rig.save(Path(folder), asynchronous)
    result["digest"] = rig.digest()  # of what was saved
    result["random"] = repr(state_module.random_state())
    result["rows"] += rig.train(go_on)
    result["final"] = rig.digest() | {"random": repr(state_module.random_state())}
    result["groups"] = len(shards.base_optimizer(rig.student.engine).param_groups)
    rig.stop()
    return result


def load_each(folders: list[str], **settings: Any) -> list[tuple[dict[str, str], tuple[str, ...]]]:
    """Loads one checkpoint after another into the same engines, over what the one before left. Per checkpoint: the
    digest after the load, and the row of the next step."""
    rig, results = Rig(**settings), []
    for folder in folders:
        rig.load(Path(folder))
        digest = rig.digest()
        results.append((digest, rig.train(1)[0]))
    rig.stop()
    return results


def save_as_deepspeed(folder: str, ds: str) -> dict[str, str]:
    """Two steps, saved in DeepSpeed's own format. Returns the digest."""
    rig = Rig(ds=ds, strategy="random")
    rig.train(2)
    rig.student.engine.save_checkpoint(folder, tag="global_step2")
    digest = rig.digest()
    rig.stop()
    return digest
