"""What the engine tests run on forked ranks: real engines over a fixed stream of random samples.

`Run` is the step of amclip_ds/step.py over samples that are made here, so that every world and split sees the same
ones; the cases below it are functions for tests/harness.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from amclip_ds.engine import runtime as engine_runtime
from amclip_ds.engine.collectives import DistributedComm
from amclip_ds.engine.grad_cache import forward_backward
from amclip_ds.engine.student import SKIPPED, EngineConfig, StepOutcome, StudentEngine
from amclip_ds.loss import LossConfig
from amclip_ds.loss.outputs import Outputs
from amclip_ds.model import masking, scoring
from amclip_ds.model.amclip import ModelConfig
from amclip_ds.model.heads import HeadsConfig
from amclip_ds.model.masking import MaskConfig
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig
from amclip_ds.optim import OptimConfig, Schedules
from amclip_ds.resilience.guards import Guards, GuardsConfig
from amclip_ds.teacher import Teacher, TeacherConfig

GLOBAL_BATCH = 8
VOCABULARY, CONTEXT = 100, 16


def tiny_model(depth: int = 2, checkpoint_every: int = 0) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=depth, heads=2,
                            mlp_ratio=2.0, checkpoint_every=checkpoint_every),
        text=TextConfig(width=32, depth=depth, heads=2, mlp_ratio=2.0, vocab_size=VOCABULARY,
                        eos_token_id=VOCABULARY - 1, context_length=CONTEXT, activation="gelu",
                        checkpoint_every=checkpoint_every),
        embed_dim=32,
    )  # fmt: skip


def recipe_model() -> tuple[ModelConfig, HeadsConfig]:
    """The towers of the recipe aclip-tiny with 1,000 token ids (of the whole table 6 M of 7 M weights never move), and
    narrow heads: a ReLU whose input is all but zero is a near tie like those of the masks, and the wide heads' 16,000 a
    step meet one within 20 steps."""
    from amclip_ds import config as settings

    changes = [
        "model.text.vocab_size=1000",
        "model.text.eos_token_id=999",
        "heads.hidden_dim=64",
        "heads.output_dim=16",
    ]
    recipe = settings.load("aclip-tiny", changes)
    return recipe.model, recipe.heads


def global_batch(step: int, model: ModelConfig, size: int = GLOBAL_BATCH) -> dict[str, Tensor]:
    """The samples of a step, the same in every world; what random masks go by is keyed by sample like the rest.

    Two batches in turn, so that there is something to learn: on ever new noise the features collapse to one point, and
    the heads' batch norm divides by next to nothing.
    """
    g = torch.Generator().manual_seed(1000 + step % 2)
    side, units = model.vision.image_size, (model.vision.grid // 2) ** 2
    text = model.text
    tokens = torch.randint(1, text.eos_token_id, (size, CONTEXT), generator=g)
    tokens[:, 10] = text.eos_token_id
    tokens[:, 11:] = 0
    boxes = torch.zeros(3, size, 4)
    boxes[:] = torch.tensor([0.0, 0.0, side, side])
    return {
        "views": coarse_images(2 * size, side, g).unflatten(0, (2, size)),
        "teacher": coarse_images(size, side, g),
        "noise": torch.rand(2, size, units, generator=g),
        "tokens": tokens,
        "boxes": boxes,
    }


def coarse_images(count: int, side: int, generator: torch.Generator) -> Tensor:
    """[count, 3, side, side] of large patches of colour. To a young model all images of white noise are alike: the
    heads' batch norm then divides by next to nothing, and what is compared is rounding."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=side, mode="nearest") * 1.5 + 0.3 * fine


def local_part(batch: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's rows."""
    size = len(batch["teacher"]) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    by_view = {"views", "noise", "boxes", "keep"}
    return {name: value[:, rows] if name in by_view else value[rows] for name, value in batch.items()}


class Run:
    """Student, teacher and guards of one rank. optim, loss, mask, guards: changes to their settings."""

    def __init__(
        self, ds: str, *, steps: int = 5, accumulation: int = 1, optim: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None, strategy: str = "random", placement: str = "auto", norm: str = "batch",
        seed: int = 0, recipe: bool = False, batch_size: int = GLOBAL_BATCH, depth: int = 2,
        checkpoint_every: int = 0, compile: bool = False,
        momentum: tuple[float, float] = (0.9, 0.99), guards: dict[str, Any] | None = None,
        runtime: engine_runtime.Runtime | None = None,
    ) -> None:  # fmt: skip
        self.runtime = runtime or engine_runtime.start()
        self.comm = DistributedComm()
        heads = HeadsConfig(hidden_dim=64, output_dim=16, norm=norm)
        self.model = tiny_model(depth, checkpoint_every)
        if recipe:
            self.model, heads = recipe_model()
        self.loss = LossConfig(**(loss or {}))
        sgd = {"name": "sgd", "lr": 0.05, "warmup_steps": 0, "weight_decay": 0.0}
        optim_config = OptimConfig(**(sgd | (optim or {})))
        teacher_config = TeacherConfig(momentum=momentum[0], final_momentum=momentum[1], placement=placement)
        self.student = StudentEngine(self.model, heads, self.loss, optim_config,
                                     EngineConfig(deepspeed=ds, compile=compile), seed=seed,
                                     runtime=self.runtime)  # fmt: skip
        self.teacher = Teacher(teacher_config, self.model, heads, self.loss, compat="paper", seed=seed,
                               student=self.student, device=self.runtime.device)  # fmt: skip
        self.schedules = Schedules(optim_config, teacher_config, steps)
        self.mask = MaskConfig(strategy=strategy)
        self.guards = Guards(GuardsConfig(**(guards or {})))
        self.batch_size = batch_size
        self.micro = batch_size // self.runtime.world_size // accumulation
        self.updates = 0

    def batch(self, step: int, keep: Tensor | None = None) -> dict[str, Tensor]:
        """This rank's part. keep: keep_indices of the global batch [V, B, K] to replay."""
        whole = global_batch(step, self.model, self.batch_size) | ({} if keep is None else {"keep": keep})
        return local_part(whole, self.runtime.rank, self.runtime.world_size)

    def look(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's target, its scores seen from the views [V, B, U], and what they and the mask choose."""
        grid = self.model.vision.grid
        target, scores = self.teacher.forward("scores", images=batch["teacher"], comm=self.comm)
        unit_scores = scoring.scores_to_views(scores, batch["boxes"], grid=grid, unit=2)
        return target, unit_scores, masking.select(self.mask, grid, scores=unit_scores, noise=batch["noise"])

    def gradients(
        self, batch: dict[str, Tensor], target: Tensor, keep: Tensor,
        admit: Callable[[Tensor, Outputs], bool] | None = None,
    ) -> Tensor:  # fmt: skip
        """Leaves the batch's gradients in the engine; returns the loss."""
        value, _, _ = forward_backward(
            self.student, batch["views"], keep, batch["tokens"], target, self.loss, self.comm, self.micro, "paper",
            admit or self.guards.admit,
        )  # fmt: skip
        return value

    def step(self, step: int, keep: Tensor | None = None, batch: dict[str, Tensor] | None = None,
             admit: Callable[[Tensor, Outputs], bool] | None = None) -> dict[str, Any]:  # fmt: skip
        """One step as amclip_ds/step.py takes it."""
        self.student.set_lr(self.schedules.lr(self.updates))
        batch = self.batch(step, keep) if batch is None else batch
        target, unit_scores, chosen = self.look(batch)
        loss = self.gradients(batch, target, batch.get("keep", chosen), admit)
        outcome: StepOutcome = self.student.step() if self.guards.admitted else SKIPPED
        if outcome.applied:
            self.updates += 1
            self.student.clamp_logit_scale()
            self.teacher.update(self.schedules.momentum(self.updates))
            self.teacher.publish()
        mean = self.comm.all_reduce_sum(loss.detach().clone()) / self.comm.world_size
        return {"loss": float(mean), "norm": outcome.grad_norm, "applied": outcome.applied, "keep": chosen,
                "scores": unit_scores}  # fmt: skip

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Whole fp32 student and teacher on rank 0."""
        return {"student": self.student.full_state(), "teacher": self.teacher.full_state()}

    def whole(self, by_view: Tensor) -> Tensor:
        """[V, b, ...] of every rank -> [V, B, ...] of the global batch."""
        return self.comm.all_gather(by_view.transpose(0, 1).contiguous()).transpose(0, 1)


@contextlib.contextmanager
def running(*args: Any, **settings: Any) -> Iterator[Run]:
    run = Run(*args, **settings)
    yield run
    engine_runtime.stop(run.runtime)


def train(ds: str, **settings: Any) -> dict[str, Any]:
    """`train_all` of one variant."""
    return train_all(ds, [settings])[0]


def train_all(ds: str, variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains each variant (settings of Run, and `replay`: keep_indices by step) on the fixed stream, one after another.

    Returns by variant: losses, norms, keep_indices and unit scores of the global batch by step, and rank 0's whole
    student and teacher at the end.
    """
    runtime = engine_runtime.start()
    results = []
    for variant in variants:
        settings = {"steps": 5} | variant
        replay = settings.pop("replay", None)
        run = Run(ds, runtime=runtime, **settings)
        rows = [run.step(step, replay[step] if replay else None) for step in range(settings["steps"])]
        assert all(row["applied"] for row in rows)
        results.append({
            "losses": [row["loss"] for row in rows], "norms": [row["norm"] for row in rows],
            "keep": [run.whole(row["keep"]) for row in rows], "scores": [run.whole(row["scores"]) for row in rows],
            "logit_scale": run.student.logit_scale(), **run.state(),
        })  # fmt: skip
    engine_runtime.stop(runtime)
    return results
