"""Model state by part, measured on real engines beside the formula's."""

from types import SimpleNamespace
from typing import Any

import torch

from amclip_ds.engine import memory
from amclip_ds.engine import runtime as engine_runtime
from amclip_ds.engine.collectives import DistributedComm
from amclip_ds.engine.grad_cache import forward_backward
from amclip_ds.engine.student import EngineConfig, StudentEngine
from amclip_ds.loss import LossConfig
from amclip_ds.model.amclip import ModelConfig
from amclip_ds.model.heads import HeadsConfig
from amclip_ds.model.masking import MaskConfig
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig
from amclip_ds.optim import OptimConfig
from amclip_ds.teacher import Teacher, TeacherConfig


def small_settings(ds: str, placement: str = "auto", optim: str = "adamw") -> SimpleNamespace:
    """A few million parameters, so that padding to the ranks is small beside them."""
    model = ModelConfig(
        vision=VisionConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=128, depth=3, heads=4),
        text=TextConfig(width=128, depth=2, heads=4, vocab_size=2000, eos_token_id=1999, context_length=16),
        embed_dim=128,
    )
    return SimpleNamespace(
        model=model, heads=HeadsConfig(hidden_dim=512, output_dim=128), loss=LossConfig(), mask=MaskConfig(),
        optim=OptimConfig(name=optim, warmup_steps=0), engine=EngineConfig(deepspeed=ds),
        teacher=TeacherConfig(placement=placement),
    )  # fmt: skip


def state_by_part(ds: str, placement: str = "auto", optim: str = "adamw") -> dict[str, dict[str, float]]:
    """{"measured": part -> bytes, "expected": likewise}: this rank's, in a second step, between backward and step.

    Stage 1 holds whole gradients until the backward pass ends, and its share of them afterwards: measured in between.
    """
    runtime = engine_runtime.start()
    comm, settings = DistributedComm(), small_settings(ds, placement, optim)
    student = StudentEngine(settings.model, settings.heads, settings.loss, settings.optim, settings.engine, seed=0,
                            runtime=runtime)  # fmt: skip
    teacher = Teacher(settings.teacher, settings.model, settings.heads, settings.loss, compat="paper", seed=0,
                      student=student, device=runtime.device)  # fmt: skip
    measured: dict[str, float] = {}
    whole: list[float] = []
    if student.stage == 1:
        reduce = student.engine.optimizer.reduce_gradients

        def measure_and_reduce(**words: Any) -> None:
            whole.append(memory.measured_model_state(student, teacher)["gradients"])
            reduce(**words)

        student.engine.optimizer.reduce_gradients = measure_and_reduce
    for _ in range(2):
        images = torch.randn(2, 4, 3, 32, 32)
        tokens = torch.randint(1, 1998, (4, 16))
        tokens[:, -1] = 1999
        target, _ = teacher.forward("scores", images=images[0], comm=comm)
        forward_backward(student, images, None, tokens, target, settings.loss, comm, micro=4)
        measured = memory.measured_model_state(student, teacher)
        measured["gradients"] = max([measured["gradients"], *whole])
        student.step()
        teacher.update(0.9)
        teacher.publish()
    expected = memory.model_state_of(settings, runtime.world_size, runtime.rank)
    engine_runtime.stop(runtime)
    return {"measured": measured, "expected": expected}
