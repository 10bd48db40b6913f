"""One optimisation step, in the paper's order: schedules, teacher's forward, student and masks, losses, step, teacher.

This is the only place that takes one. Shapes: V views, B this rank's samples, K kept tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.data import photometric
from amclip_ds.data.batch import Batch
from amclip_ds.engine.student import SKIPPED, StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.grad_cache import forward_backward
from amclip_ds.host_copies import taken
from amclip_ds.masks import NONE, MaskConfig, MaskInputs, needs_of
from amclip_ds.masks.selection import Selection
from amclip_ds.masks.units import pool
from amclip_ds.method import Method
from amclip_ds.model import scoring
from amclip_ds.model.features import Losses, StudentInputs, ViewGroup
from amclip_ds.model.teacher_model import Observed
from amclip_ds.objectives import RECORDED, with_frozen
from amclip_ds.optim import Schedules
from amclip_ds.resilience.guards import Guards


class Frozen(Protocol):
    """distill.FrozenTeacher."""

    def embed(self, inputs: StudentInputs, token_ids: Tensor, micro: int) -> dict[str, Tensor]:
        """Its embeddings of the views and of the texts, by the names of features.FROZEN."""
        ...


NOTHING_OBSERVED = Observed({}, None)


@dataclass
class StepResult:
    """What one step did. Tensors stay on the device until they are logged."""

    loss: Tensor
    parts: dict[str, Tensor]
    """every term, unweighted, as loss_NAME"""
    lr: float
    momentum: float
    grad_norm: float | Tensor
    applied: bool
    logit_scale: Tensor
    keep_indices: list[Tensor | None]
    """by view [B, K] ascending; None: every token stayed"""
    kept_tokens: int | list[int]
    """of each view, a list where they differ"""
    sample_ids: Tensor
    progress: float = 1.0
    """how much of the run was done before it, 0 to 1"""
    scores: Tensor | None = None
    """[B, n] the teacher's of its crop, or [V, B, N] of all views; where a mask goes by them"""


def train_step(
    batch: Batch,
    student: StudentEngine,
    teacher: Teacher | None,
    schedules: Schedules,
    updates: int,
    method: Method,
    comm: Comm,
    micro: int,
    guards: Guards,
    frozen: Frozen | None = None,
) -> StepResult:
    """Trains on one batch (this rank's part of the global one). Collective: every rank must call.

    updates: optimizer steps applied so far; learning rate and momentum are functions of it.
    micro: samples whose activations are held at a time; the negatives are the global batch's whatever it is.
    guards: sees the loss before its gradient exists; what it refuses is not stepped, on any rank. Not waited for.
    frozen: distill.teacher.
    """
    lr, progress = schedules.lr(updates), schedules.progress(updates)
    student.set_lr(lr, progress)

    if method.changes(schedules.progress(max(0, updates - 1)), progress):
        guards.forget()
    reads_teacher = method.reads_teacher  # now or later: its weights must then be those of the step before
    method = method.at(progress)
    views = student.change_views(batch.views_uint8, batch.photometric)
    observed = NOTHING_OBSERVED
    if teacher is not None and method.reads_teacher:
        observed = teacher.observe(  # its images have no name here: they are let go of before the student's forward
            teachers_images(batch, views, method, student.normalise), method.wants, comm, progress
        )
    inputs = student_inputs(batch, views, observed.scores, method, progress, student.scores_to_views)
    targets = observed.targets
    if frozen is not None and method.reads_frozen:
        targets = with_frozen(method.objectives, targets, frozen.embed(inputs, batch.token_ids, micro))
    losses, kept = forward_backward(student, inputs, targets, comm, micro, guards.admit)
    outcome = student.step()
    if not outcome.applied and not guards.admitted:
        outcome = SKIPPED

    momentum = schedules.momentum(updates + 1)
    if outcome.applied:
        student.clamp_logit_scale()
        student.commit(comm, progress)
        if teacher is not None:
            teacher.update(momentum)
            if reads_teacher:
                teacher.publish(whole=False)
    keep_indices = by_view(inputs, kept)
    return StepResult(
        loss=losses.total.detach(),
        parts=recorded(losses),
        lr=lr,
        momentum=momentum,
        grad_norm=outcome.grad_norm,
        applied=outcome.applied,
        logit_scale=losses.logit_scale,
        keep_indices=keep_indices,
        kept_tokens=count_kept(keep_indices, method.grid**2),
        sample_ids=batch.sample_ids,
        progress=progress,
        scores=observed.scores,
    )


def recorded(losses: Losses) -> dict[str, Tensor]:
    """Every term as loss_NAME; those of RECORDED first, 0 where their objective is not built."""
    terms = dict.fromkeys(RECORDED, losses.total.new_zeros(())) | losses.terms
    return {f"loss_{name}": term for name, term in terms.items()}


def teachers_images(
    batch: Batch, views: Tensor, method: Method, normalise: Callable[[Tensor], Tensor] = photometric.normalise
) -> Tensor:
    """What the teacher looks at, normalised: a crop [B, 3, h, w], or the views as the student gets them.

    normalise: photometric.normalise, or the same compiled.
    """
    if method.sees_views:
        return views
    crop = batch.teacher_uint8 if method.teacher_view is None else batch.views_uint8[method.teacher_view]
    assert crop is not None
    return normalise(crop)


def student_inputs(
    batch: Batch,
    views: Tensor,
    scores: Tensor | None,
    method: Method,
    progress: float,
    to_views: Callable[..., Tensor] = scoring.scores_to_views,
) -> StudentInputs:
    """What the student reads: the views [V, B, 3, H, W], changed and normalised, by group, with what their masks go by.

    scores: the teacher's of its crop [B, n], or of all views [V, B, N]. to_views: scoring.scores_to_views, or the same
    compiled.
    """
    groups = []
    for group in method.groups(progress):
        selections = [
            selection(mask, of, batch, scores, method.grid, progress, method.teacher_view, to_views)
            for mask, of in group.masks
        ]
        places = [tuple(group.views.index(view) for view in of) for _, of in group.masks]
        is_masked = any(mask.strategy != NONE for mask, _ in group.masks)
        groups.append(
            ViewGroup(
                group.views,
                taken(views, group.views),
                tuple(chosen._replace(views=at) for chosen, at in zip(selections, places)) if is_masked else (),
            )
        )
    return StudentInputs(tuple(groups), texts_of(batch, method), batch.text_lengths, progress)


def texts_of(batch: Batch, method: Method) -> dict[str, Tensor]:
    """The texts in each form that some objective reads."""
    made = {"plain": batch.token_ids, "masked": batch.masked_ids, "cloze": batch.cloze_ids}
    return {name: token_ids for name, token_ids in made.items() if name in method.texts and token_ids is not None}


def selection(
    mask: MaskConfig,
    views: tuple[int, ...],
    batch: Batch,
    scores: Tensor | None,
    grid: int,
    progress: float,
    teacher_view: int | None = None,
    to_views: Callable[..., Tensor] = scoring.scores_to_views,
) -> Selection:
    """How the tokens of some views are chosen. scores: the teacher's, [B, n] of its crop or of teacher_view, or
    [V, B, N] of all views."""
    needs, units = needs_of(mask), (grid // mask.unit) ** 2
    given: dict[str, Tensor] = {"progress": torch.full((), progress, device=batch.token_ids.device)}
    for name, draws in (("noise", batch.mask_noise), ("noise2", batch.mask_noise2)):
        if name in needs:
            assert draws is not None
            given[name] = taken(draws, views)[..., :units].flatten(0, 1)
    if "scores" in needs:
        assert scores is not None
        given["scores"] = scores_of(views, batch, scores, grid, mask.unit, teacher_view, to_views)
    return Selection(mask, MaskInputs(grid, mask.unit, len(views), **given))


def scores_of(
    views: tuple[int, ...],
    batch: Batch,
    scores: Tensor,
    grid: int,
    unit: int,
    teacher_view: int | None,
    to_views: Callable[..., Tensor],
) -> Tensor:
    """The teacher's scores seen from some views, [v * B, U]."""
    if scores.dim() == 3:  # of the views themselves
        return pool(taken(scores, views).flatten(0, 1), grid, unit)
    flips = None if batch.flips is None else taken(batch.flips, views)
    boxes = taken(batch.boxes, (*views, len(batch.boxes) - 1 if teacher_view is None else teacher_view))
    return to_views(scores, boxes, grid, unit, flips).flatten(0, 1)


def by_view(inputs: StudentInputs, kept: list[Tensor | None]) -> list[Tensor | None]:
    """keep_indices [B, K] of each view, in the order of data.views."""
    found: dict[int, Tensor | None] = {}
    for group, rows in zip(inputs.groups, kept):
        for place, view in enumerate(group.views):
            found[view] = None if rows is None else rows[place]
    return [found[view] for view in sorted(found)]


def count_kept(keep_indices: list[Tensor | None], num_patches: int) -> int | list[int]:
    """Kept tokens of a view; a list where views differ."""
    counts = [num_patches if kept is None else kept.shape[-1] for kept in keep_indices]
    return counts[0] if len(set(counts)) == 1 else counts
