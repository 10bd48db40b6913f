"""Model state by part, measured on real engines beside the formula's."""

from typing import Any

import torch

from amclip_ds.config import RunConfig, TrainConfig
from amclip_ds.engine import memory
from amclip_ds.engine.ds_config import EngineConfig
from amclip_ds.engine.student import StepOutcome
from amclip_ds.method import method_of
from amclip_ds.model.config import HeadsConfig, ModelConfig, TeacherConfig, TextConfig, VisionConfig
from amclip_ds.optim import OptimConfig, Schedules
from amclip_ds.plan.model_state import state_of
from amclip_ds.plan.work import work_of
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm
from amclip_ds.resilience.config import GuardsConfig
from amclip_ds.resilience.guards import Guards
from amclip_ds.run import build_engines
from amclip_ds.step import train_step
from tests.distributed.batches import made_batch


def small_settings(ds: str, placement: str = "auto", optim: str = "adamw") -> TrainConfig:
    """A few million parameters, so that padding to the ranks is small beside them."""
    model = ModelConfig(
        vision=VisionConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=128, depth=3, heads=4),
        text=TextConfig(width=128, depth=2, heads=4, vocab_size=2000, eos_token_id=1999, context_length=16),
        embed_dim=128,
    )
    return TrainConfig(
        run=RunConfig(steps=2),
        model=model,
        heads=HeadsConfig(hidden_dim=512, output_dim=128),
        optim=OptimConfig(name=optim, warmup_steps=0),
        engine=EngineConfig(deepspeed=ds),
        teacher=TeacherConfig(placement=placement),
    )


def state_by_part(ds: str, placement: str = "auto", optim: str = "adamw") -> dict[str, dict[str, float]]:
    """{"measured": part -> bytes, "expected": the same}: this rank's, in a second step, between backward and step.

    Stage 1 holds whole gradients until the backward pass ends, and its share of them afterwards: measured in between.
    """
    runtime = engine_runtime.start()
    comm, settings = DistributedComm(), small_settings(ds, placement, optim)
    method = method_of(settings)
    student, teacher = build_engines(settings, method, runtime)
    measured: dict[str, float] = {}
    whole: list[float] = []
    if student.stage == 1:
        reduce = student.engine.optimizer.reduce_gradients

        def measure_and_reduce(**words: Any) -> None:
            whole.append(memory.measured_model_state(student, teacher)["gradients"])
            reduce(**words)

        student.engine.optimizer.reduce_gradients = measure_and_reduce
    step = student.step

    def measure_and_step() -> StepOutcome:
        measured.update(memory.measured_model_state(student, teacher))
        measured["gradients"] = max([measured["gradients"], *whole])
        return step()

    student.step = measure_and_step  # type: ignore[method-assign]
    for index in range(2):
        tokens = torch.randint(1, 1998, (4, 16))
        tokens[:, -1] = 1999
        batch = made_batch(torch.randn(2, 4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.rand(2, 4, 4), tokens)
        train_step(
            batch,
            student,
            teacher,
            Schedules(settings.optim, settings.teacher, 2),
            index,
            method,
            comm,
            micro=4,
            guards=Guards(GuardsConfig()),
        )
    expected = state_of(work_of(settings, runtime.world_size), runtime.rank)
    engine_runtime.stop(runtime)
    return {"measured": measured, "expected": expected}
