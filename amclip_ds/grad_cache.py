"""Forward and backward of a rank's batch, whole or in pieces (GradCache), with the same gradients.

In pieces, only the towers run piece by piece, and with them the terms that are means over samples; what the towers give
is cached without gradient, then the objectives run once on the whole local batch, and each piece's towers run again
with gradient against the cached features' gradients (Gao et al., arXiv 2101.06983). Negatives and statistics are the
global batch's for any split. Nothing here knows an objective.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.engine.student import StudentEngine
from amclip_ds.model.features import Encoded, Losses, StudentInputs, Targets, averaged, joined, pieces_of


def forward_backward(
    student: StudentEngine,
    inputs: StudentInputs,
    targets: Targets,
    comm: Comm,
    micro: int,
    admit: Callable[[Losses], Tensor | float] = lambda losses: 1.0,
) -> tuple[Losses, list[Tensor | None]]:
    """The losses, and each group of views' keep_indices [v, B, K]; gradients have been left in the engine.

    micro: samples a piece; B or more runs the batch whole. Collective: every rank must call.
    admit: asked before there is any gradient, for a number that the loss is multiplied by; alike on every rank.
    """
    B = inputs.num_samples
    if micro >= B:
        losses, whole = student.encode_and_losses(inputs, targets, comm)
        student.backward(losses.total * admit(losses))
        return losses, kept_of_batch(inputs, [whole])

    pieces = [slice(start, min(start + micro, B)) for start in range(0, B, micro)]
    with torch.no_grad():
        cached = [student.encode(inputs.part(piece), pieces_of(targets, piece)) for piece in pieces]
    cls, eot = joined(cached)
    for feature in (cls, *eot.values()):
        feature.requires_grad_()
    terms, weighted = averaged(cached, [piece.stop - piece.start for piece in pieces])
    given = dict(eot)  # ZeRO-3's hooks put other tensors, which are no leaves, into the dict that they are given
    losses = student.losses(cls, given, targets, terms, weighted, comm, inputs.progress)
    kept = kept_of_batch(inputs, [piece.kept for piece in cached])
    factor = admit(losses)
    with student.accumulate_gradients():
        if losses.total.requires_grad:  # means over samples alone have their gradient in the pieces
            student.backward(losses.total * factor)
        for piece, first in zip(pieces, cached):
            again = student.encode(inputs.part(piece, first.kept), pieces_of(targets, piece))
            student.backward(surrogate(again, cls, eot, piece, factor))
    return losses, kept


def surrogate(again: Encoded, cls: Tensor, eot: dict[str, Tensor], piece: slice, factor: Tensor | float) -> Tensor:
    """A scalar whose gradient is the loss's, through a piece's towers. cls, eot: the batch's cached features, whose
    gradients have the factor already."""
    parts = []
    if cls.grad is not None:
        parts.append((again.cls * cls.grad[:, piece]).sum())
    for name, cached in eot.items():
        if cached.grad is not None:
            parts.append((again.eot[name] * cached.grad[piece]).sum())
    if again.weighted is not None:
        parts.append(again.weighted * ((piece.stop - piece.start) / cls.shape[1]) * factor)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def kept_of_batch(inputs: StudentInputs, pieces: list[tuple[Tensor | None, ...]]) -> list[Tensor | None]:
    """The pieces' keep_indices, by group of views, as [v, B, K]."""
    found: list[Tensor | None] = []
    for group, held in zip(inputs.groups, zip(*pieces)):
        by_view = [rows.unflatten(0, (len(group.views), -1)) for rows in held if rows is not None]
        found.append(torch.cat(by_view, dim=1) if by_view else None)
    return found
