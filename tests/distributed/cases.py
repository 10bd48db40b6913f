"""What the engine tests run on forked ranks: real engines over a fixed stream of random samples."""

from typing import Any

import torch

from amclip_ds.engine import runtime as engine_runtime
from amclip_ds.engine.collectives import DistributedComm
from amclip_ds.engine.grad_cache import forward_backward
from amclip_ds.engine.student import EngineConfig, StudentEngine
from amclip_ds.loss import LossConfig
from amclip_ds.model import masking, scoring
from amclip_ds.model.amclip import ModelConfig
from amclip_ds.model.heads import HeadsConfig
from amclip_ds.model.masking import MaskConfig
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig
from amclip_ds.optim import OptimConfig, Schedules
from amclip_ds.teacher import Teacher, TeacherConfig

GLOBAL_BATCH, GRID = 8, 4


def tiny_model() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=2, heads=2,
                            mlp_ratio=2.0),
        text=TextConfig(width=32, depth=2, heads=2, mlp_ratio=2.0, vocab_size=100, eos_token_id=99, context_length=16,
                        activation="gelu"),
        embed_dim=32,
    )  # fmt: skip


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """The samples of a step, the same in every world."""
    g = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(1, 98, (GLOBAL_BATCH, 16), generator=g)
    tokens[:, 10] = 99
    tokens[:, 11:] = 0
    boxes = torch.zeros(3, GLOBAL_BATCH, 4)
    boxes[:] = torch.tensor([0.0, 0.0, 32.0, 32.0])
    return {
        "views": torch.randn(2, GLOBAL_BATCH, 3, 32, 32, generator=g),
        "teacher": torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=g),
        "noise": torch.rand(2, GLOBAL_BATCH, (GRID // 2) ** 2, generator=g),
        "tokens": tokens,
        "boxes": boxes,
    }


def local_part(batch: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This rank's rows."""
    size = GLOBAL_BATCH // world_size
    rows = slice(rank * size, (rank + 1) * size)
    by_view = {"views", "noise", "boxes"}
    return {name: value[:, rows] if name in by_view else value[rows] for name, value in batch.items()}


def train(
    ds: str, steps: int = 5, optim: dict[str, Any] | None = None, micro: int = GLOBAL_BATCH, strategy: str = "random",
    loss: dict[str, Any] | None = None, placement: str = "auto", norm: str = "batch",
    replay: list[torch.Tensor] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains on the fixed stream. Returns losses, norms, the final student and teacher (rank 0), kept indices."""
    runtime = engine_runtime.start()
    comm = DistributedComm()
    model, heads = tiny_model(), HeadsConfig(hidden_dim=64, output_dim=16, norm=norm)
    loss_config = LossConfig(**(loss or {}))
    optim_config = OptimConfig(**({"name": "sgd", "lr": 0.05, "warmup_steps": 0, "weight_decay": 0.0} | (optim or {})))
    teacher_config = TeacherConfig(momentum=0.9, final_momentum=0.99, placement=placement)
    student = StudentEngine(model, heads, loss_config, optim_config, EngineConfig(deepspeed=ds), seed=0, runtime=runtime)
    teacher = Teacher(teacher_config, model, heads, loss_config, compat="paper", seed=0, student=student,
                      device=runtime.device)  # fmt: skip
    schedules = Schedules(optim_config, teacher_config, steps)
    mask = MaskConfig(strategy=strategy)
    losses, norms, kept = [], [], []
    for step in range(steps):
        student.set_lr(schedules.lr(step))
        batch = local_part(global_batch(step), runtime.rank, runtime.world_size)
        target, scores = teacher.forward("scores", images=batch["teacher"], comm=comm)
        unit_scores = scoring.scores_to_views(scores, batch["boxes"], grid=GRID, unit=2)
        keep = masking.select(mask, GRID, scores=unit_scores, noise=batch["noise"])
        value, _, _ = forward_backward(
            student, batch["views"], keep, batch["tokens"], target, loss_config, comm, micro=micro
        )
        outcome = student.step()
        assert outcome.applied
        student.clamp_logit_scale()
        teacher.update(schedules.momentum(step + 1))
        teacher.publish()
        losses.append(float(comm.all_reduce_sum(value.clone()) / comm.world_size))
        norms.append(outcome.grad_norm)
        kept.append(keep)
    result = {"losses": losses, "norms": norms, "kept": kept, "student": student.full_state(),
              "teacher": teacher.full_state(), "logit_scale": student.logit_scale()}  # fmt: skip
    engine_runtime.stop(runtime)
    return result
