"""Occlusion: two views of one crop that share no patch, distinguished from other images' (OCL, 2024), without a head.

Shapes: B samples of this rank, W ranks, D vision width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.model.config import OcclusionOptions
from amclip_ds.model.features import Features, Terms
from amclip_ds.objectives.base import Objective


class Occlusion(Objective):
    """Cross-entropy between the class tokens of the first two views, both ways; negatives are all ranks'."""

    Options = OcclusionOptions
    features = frozenset({"cls"})
    views = (0, 1)

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        assert features.cls is not None
        return {"occlusion": occlusion(features.cls, self.options.temperature, self.options.kappa, comm)}


def occlusion(cls_2BD: Tensor, temperature: float, kappa: float, comm: Comm) -> Tensor:
    """Mean over rows and both directions. Collective: every rank must call."""
    rows = F.normalize(cls_2BD.float(), dim=-1)
    gathered = comm.all_gather(rows.transpose(0, 1).contiguous()).transpose(0, 1)  # [2, W * B, D]
    labels = comm.rank * rows.shape[1] + torch.arange(rows.shape[1], device=rows.device)
    total = rows.new_zeros(())
    for own, other in ((0, 1), (1, 0)):
        logits = similarity(rows[own] @ gathered[other].T, kappa) / temperature
        total = total + F.cross_entropy(logits, labels)
    return total / 2


def similarity(cosine: Tensor, kappa: float) -> Tensor:
    """(1 + c) / 2 / (1 + kappa (1 - c)): 0 for opposite, 1 for equal directions."""
    return 0.5 * (1 + cosine) / (1 + kappa * (1 - cosine))
