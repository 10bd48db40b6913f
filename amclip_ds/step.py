"""One optimisation step, in the paper's order: schedules, teacher's look, keep_indices, student, losses, step, teacher.

Shapes: V views, B this rank's samples, N patches of the teacher's grid, K kept tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from amclip_ds.config import TrainConfig
from amclip_ds.data import photometric
from amclip_ds.data.batch import Batch
from amclip_ds.engine.grad_cache import forward_backward
from amclip_ds.engine.student import SKIPPED, StudentEngine
from amclip_ds.loss.comm import Comm
from amclip_ds.model import masking, scoring
from amclip_ds.model.config import needs_scores
from amclip_ds.optim import Schedules
from amclip_ds.resilience.guards import Guards
from amclip_ds.teacher import Teacher


@dataclass
class StepResult:
    """What one step did. Tensors stay on the device until they are logged."""

    loss: Tensor
    parts: dict[str, Tensor]
    lr: float
    momentum: float
    grad_norm: float
    applied: bool
    logit_scale: Tensor
    kept_tokens: int
    sample_ids: Tensor


def train_step(
    batch: Batch, student: StudentEngine, teacher: Teacher | None, schedules: Schedules, updates: int,
    config: TrainConfig, comm: Comm, micro: int, guards: Guards,
) -> StepResult:  # fmt: skip
    """Trains on one batch (this rank's part of the global one). Collective: every rank must call.

    updates: optimizer steps applied so far; learning rate and momentum are functions of it.
    micro: samples whose activations are held at a time; the negatives are the global batch's whatever it is.
    guards: sees the loss before its gradient exists; what it refuses is not stepped, on any rank.
    """
    lr = schedules.lr(updates)
    student.set_lr(lr)

    views = photometric.apply(batch.views_uint8, batch.photometric)
    target, keep_indices = look(batch, teacher, config, comm)
    loss, parts, logit_scale = forward_backward(
        student, views, keep_indices, batch.token_ids, target, config.loss, comm, micro, config.compat, guards.admit
    )
    outcome = student.step() if guards.admitted else SKIPPED

    momentum = schedules.momentum(updates + 1)
    if outcome.applied:
        student.clamp_logit_scale()
        if teacher is not None:
            teacher.update(momentum)
            teacher.publish(whole=False)
    num_patches = config.model.vision.grid**2
    return StepResult(
        loss=loss, parts=parts, lr=lr, momentum=momentum, grad_norm=outcome.grad_norm, applied=outcome.applied,
        logit_scale=logit_scale, kept_tokens=num_patches if keep_indices is None else keep_indices.shape[-1],
        sample_ids=batch.sample_ids,
    )  # fmt: skip


@torch.no_grad()
def look(batch: Batch, teacher: Teacher | None, config: TrainConfig, comm: Comm) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's pass over its crop: (online-to-EMA target [B, C] or None, keep_indices [V, B, K] or None)."""
    target = scores = None
    if teacher is not None and batch.teacher_uint8 is not None:
        pixels = photometric.normalise(batch.teacher_uint8)
        target, scores = teacher.forward("scores", images=pixels, comm=comm)
    return target, choose_tokens(batch, scores, config)


def choose_tokens(batch: Batch, scores: Tensor | None, config: TrainConfig) -> Tensor | None:
    """keep_indices [V, B, K] of the views' patch tokens, or None where every token stays."""
    unit_scores = None
    grid = config.model.vision.grid
    if scores is not None and needs_scores(config.mask.strategy):
        unit_scores = scoring.scores_to_views(scores, batch.boxes, grid=grid, unit=config.mask.unit)
    return masking.select(config.mask, grid, scores=unit_scores, noise=batch.mask_noise)
