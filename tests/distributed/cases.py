"""What the engine tests run on forked ranks: real engines over a fixed stream of random samples.

`Run` takes steps by amclip_ds/step.py over samples that are made here, so that every world and split sees the same
ones; the cases below it are functions for tests/harness.py.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amclip_ds.compat import COMPAT
from amclip_ds.data import photometric
from amclip_ds.data.batch import Batch
from amclip_ds.data.photometric import normalise
from amclip_ds.engine.ds_config import EngineConfig
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.grad_cache import forward_backward
from amclip_ds.masks import MaskConfig, MaskInputs
from amclip_ds.masks.selection import select
from amclip_ds.method import Method
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig, TeacherConfig, TextConfig, VisionConfig
from amclip_ds.model.features import Losses
from amclip_ds.objectives import chosen
from amclip_ds.optim import OptimConfig, Schedules
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm
from amclip_ds.resilience.config import GuardsConfig
from amclip_ds.resilience.guards import Guards
from amclip_ds.step import student_inputs, train_step
from tests.distributed.batches import local_part, made_batch, noise_of, watch

GLOBAL_BATCH = 8
VOCABULARY, CONTEXT = 100, 16


def tiny_model(depth: int = 2, checkpoint_every: int = 0) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            name="vit_tiny_patch16_224",
            image_size=32,
            patch_size=8,
            width=32,
            depth=depth,
            heads=2,
            mlp_ratio=2.0,
            checkpoint_every=checkpoint_every,
        ),
        text=TextConfig(
            width=32,
            depth=depth,
            heads=2,
            mlp_ratio=2.0,
            vocab_size=VOCABULARY,
            eos_token_id=VOCABULARY - 1,
            context_length=CONTEXT,
            activation="gelu",
            checkpoint_every=checkpoint_every,
        ),
        embed_dim=32,
    )


def recipe_model() -> tuple[ModelConfig, HeadsConfig]:
    """The towers of the recipe aclip-tiny with 1,000 token ids (of the whole table 6 M of 7 M weights never move), and
    narrow heads."""
    from amclip_ds import config as settings

    changes = [
        "model.text.vocab_size=1000",
        "model.text.eos_token_id=999",
        "heads.hidden_dim=64",
        "heads.output_dim=16",
    ]
    recipe = settings.load("aclip-tiny", changes)
    return recipe.model, recipe.heads


@contextlib.contextmanager
def without_kinks() -> Iterator[None]:
    """Heads that are built within have GELU for ReLU. A ReLU whose input is zero but for rounding lets a gradient
    through in one world and not in the other, and what is compared to the sixth digit is then how near to zero an
    input came (adr/0091)."""
    relu, torch.nn.ReLU = torch.nn.ReLU, torch.nn.GELU  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.nn.ReLU = relu  # type: ignore[misc]


def global_batch(step: int, model: ModelConfig, size: int = GLOBAL_BATCH) -> Batch:
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
    views = coarse_images(2 * size, side, g).unflatten(0, (2, size))
    teacher = coarse_images(size, side, g)
    return made_batch(views, teacher, torch.rand(2, size, units, generator=g), tokens)


def coarse_images(count: int, side: int, generator: torch.Generator) -> Tensor:
    """[count, 3, side, side] of large patches of colour. To a young model all images of white noise are alike: the
    heads' batch norm then divides by next to nothing, and what is compared is rounding."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=side, mode="nearest") * 1.5 + 0.3 * fine


def pixels(images_uint8: Tensor | None) -> Tensor:
    """As the teacher reads them."""
    assert images_uint8 is not None
    return normalise(images_uint8)


class Run:
    """Student, teacher and guards of one rank. optim, loss, mask, guards: changes to their settings.
    own: further objectives, with their options. roles: the second view keeps half as many tokens as the first, by
    another mask, and the image-text loss reads shortened texts. smooth: heads without_kinks."""

    def __init__(
        self,
        ds: str,
        *,
        steps: int = 5,
        accumulation: int = 1,
        optim: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        strategy: str = "random",
        placement: str = "auto",
        norm: str = "batch",
        seed: int = 0,
        recipe: bool = False,
        smooth: bool = False,
        batch_size: int = GLOBAL_BATCH,
        depth: int = 2,
        checkpoint_every: int = 0,
        compile: str = "none",
        momentum: tuple[float, float] = (0.9, 0.99),
        guards: dict[str, Any] | None = None,
        runtime: engine_runtime.Runtime | None = None,
        own: dict[str, Any] | None = None,
        roles: bool = False,
        flat: bool = True,
        fp8: str = "none",
    ) -> None:
        self.runtime = runtime or engine_runtime.start()
        self.comm = DistributedComm()
        heads = HeadsConfig(hidden_dim=64, output_dim=16, norm=norm)
        self.model = tiny_model(depth, checkpoint_every)
        if recipe:
            self.model, heads = recipe_model()
        sgd = {"name": "sgd", "lr": 0.05, "warmup_steps": 0, "weight_decay": 0.0}
        optim_config = OptimConfig(**(sgd | (optim or {})))
        teacher_config = TeacherConfig(momentum=momentum[0], final_momentum=momentum[1], placement=placement)
        self.roles = roles
        self.objectives = chosen(LossConfig(**(loss or {})), heads, has_masked_text=roles) | (own or {})
        engine = EngineConfig(deepspeed=ds, compile=compile, flat_gradients=flat, fp8=fp8)
        with without_kinks() if smooth else contextlib.nullcontext():
            self.student = StudentEngine(
                self.model, self.objectives, optim_config, engine, seed=seed, runtime=self.runtime
            )
            self.teacher = Teacher(
                teacher_config, self.model, self.objectives, student=self.student, device=self.runtime.device
            )
        self.schedules = Schedules(optim_config, teacher_config, steps)
        self.mask, self.looked_at = MaskConfig(strategy=strategy), list[MaskInputs]()
        self.guards = Guards(GuardsConfig(**(guards or {})))
        self.batch_size = batch_size
        self.micro = batch_size // self.runtime.world_size // accumulation
        self.updates = 0

    def batch(self, step: int, keep: Tensor | None = None) -> Batch:
        """This rank's part. keep: keep_indices of the global batch [V, B, K] to replay."""
        whole = global_batch(step, self.model, self.batch_size)
        if keep is not None:
            whole = replace(whole, mask_noise=noise_of(keep, self.model.vision.grid))
        return local_part(whole, self.runtime.rank, self.runtime.world_size)

    def shortened(self, batch: Batch) -> Batch:
        """The batch with its texts cut to 6 tokens, as data.text_mask gives them beside the whole ones."""
        cut = batch.token_ids[:, :6].clone()
        cut[:, -1] = self.model.text.eos_token_id
        return replace(batch, masked_ids=cut)

    def method(self, replays: bool = False) -> Method:
        """The run's, with a mask that is watched; replays: the noise says what stays."""
        self.looked_at.clear()
        name = watch("given" if replays else self.mask.strategy, self.looked_at.append)
        masks = (MaskConfig(name), MaskConfig("attentive", 0.25) if self.roles else MaskConfig(name))
        return Method(self.objectives, masks, self.model.vision.grid, COMPAT["paper"])

    def scores(self) -> Tensor:
        """[V, b, U]: the teacher's scores of the last step, seen from the views."""
        pieces = [inputs.scores.unflatten(0, (2, -1)) for inputs in self.looked_at if inputs.scores is not None]
        return torch.cat(pieces, dim=1)

    def views(self, batch: Batch) -> Tensor:
        """As the student gets them."""
        return photometric.apply(batch.views_uint8, batch.photometric)

    def gradients(self, batch: Batch) -> Losses:
        """Leaves the batch's gradients in the engine, and takes no step."""
        method = self.method()
        observed = self.teacher.observe(pixels(batch.teacher_uint8), method.wants, self.comm)
        inputs = student_inputs(batch, self.views(batch), observed.scores, method, progress=0.0)
        losses, _ = forward_backward(self.student, inputs, observed.targets, self.comm, self.micro)
        return losses

    def step(self, step: int, keep: Tensor | None = None, batch: Batch | None = None) -> dict[str, Any]:
        """One step; `keep` of the result is what the run's own mask chooses, also where another choice was replayed."""
        batch = self.batch(step, keep) if batch is None else batch
        method = self.method(replays=keep is not None)
        result = train_step(
            batch, self.student, self.teacher, self.schedules, self.updates, method, self.comm, self.micro, self.guards
        )
        self.updates += int(result.applied)
        mean = self.comm.all_reduce_sum(result.loss.clone()) / self.comm.world_size
        scores = self.scores()
        own = torch.stack([kept for kept in result.keep_indices if kept is not None])
        if keep is not None:
            inputs = MaskInputs(method.grid, self.mask.unit, 2, noise=None, scores=scores.flatten(0, 1))
            selected = select(self.mask, inputs)
            assert selected is not None
            own = selected.unflatten(0, (2, -1))
        return {
            "loss": float(mean),
            "norm": float(result.grad_norm),
            "applied": result.applied,
            "keep": own,
            "scores": scores,
        }

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
        results.append(
            {
                "losses": [row["loss"] for row in rows],
                "norms": [row["norm"] for row in rows],
                "keep": [run.whole(row["keep"]) for row in rows],
                "scores": [run.whole(row["scores"]) for row in rows],
                "logit_scale": run.student.logit_scale(),
                **run.state(),
            }
        )
    engine_runtime.stop(runtime)
    return results
