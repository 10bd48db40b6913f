"""Forward and backward of a rank's batch, whole or in pieces (GradCache), with the same gradients.

In pieces, only the towers run piece by piece: their features (CLS, EOT) are cached without gradient, then heads, batch
norm and losses run once on the whole local batch, and each piece's towers run again with gradient against the cached
features' gradients (Gao et al., arXiv 2101.06983). Negatives and statistics are the global batch's for any split.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from amclip_ds.engine.student import StudentEngine
from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import Comm
from amclip_ds.loss.outputs import Outputs
from amclip_ds.loss.total import total_loss


def forward_backward(
    student: StudentEngine, views: Tensor, keep_indices: Tensor | None, token_ids: Tensor, target: Tensor | None,
    config: LossConfig, comm: Comm, micro: int, compat: str = "paper",
    admit: Callable[[Tensor, Outputs], bool] = lambda loss, outputs: True,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:  # fmt: skip
    """Loss, its terms and exp(logit_scale), after gradients have been left in the engine.

    views: [V, B, 3, H, W]. keep_indices: [V, B, K] or None. token_ids: [B, T]. target: [B, P] or None.
    micro: samples a piece; B or more runs the batch whole. Collective: every rank must call.
    admit: asked before there is any gradient, and must answer alike on every rank; False leaves the engine without one.
    """
    B = token_ids.shape[0]
    if micro >= B:
        outputs = student.forward("all", comm=comm, **tower_inputs(views, keep_indices, token_ids, slice(None)))
        loss, parts = total_loss(outputs, target, config, comm, compat)
        if admit(loss, outputs):
            student.backward(loss)
        return loss.detach(), parts, outputs.logit_scale.detach()

    pieces = [slice(start, min(start + micro, B)) for start in range(0, B, micro)]
    with torch.no_grad():
        cached = [student.forward("towers", **tower_inputs(views, keep_indices, token_ids, piece)) for piece in pieces]
    V = views.shape[0]
    cls = torch.cat([features.cls.unflatten(0, (V, -1)) for features in cached], dim=1).flatten(0, 1)
    eot = torch.cat([features.eot for features in cached])
    cls.requires_grad_()
    eot.requires_grad_()
    outputs = student.forward("heads", cls=cls, eot=eot, comm=comm)
    loss, parts = total_loss(outputs, target, config, comm, compat)
    if not admit(loss, outputs):
        return loss.detach(), parts, outputs.logit_scale.detach()
    with student.several_backwards():
        student.backward(loss)
        cls_grad = cls.grad.unflatten(0, (V, -1))  # type: ignore[union-attr]
        for piece in pieces:
            features = student.forward("towers", **tower_inputs(views, keep_indices, token_ids, piece))
            surrogate = (features.cls * cls_grad[:, piece].flatten(0, 1)).sum() + (features.eot * eot.grad[piece]).sum()  # type: ignore[index]
            student.backward(surrogate)
    return loss.detach(), parts, outputs.logit_scale.detach()


def tower_inputs(views: Tensor, keep_indices: Tensor | None, token_ids: Tensor, piece: slice) -> dict[str, Tensor]:
    """What the towers read for the samples of a piece, all its views."""
    inputs = {"images": views[:, piece].flatten(0, 1), "token_ids": token_ids[piece]}
    if keep_indices is not None:
        inputs["keep_indices"] = keep_indices[:, piece].flatten(0, 1)
    return inputs
