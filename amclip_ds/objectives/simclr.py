"""Online-to-online: SimCLR's NT-Xent between two views.

Shapes: V views, B samples of this rank, W ranks, P output of the head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import HeadsConfig
from amclip_ds.model.features import Features, Terms
from amclip_ds.model.heads import MLPHead, of_views
from amclip_ds.model.towers import normalise
from amclip_ds.objectives import ring
from amclip_ds.objectives.base import Objective, Weighted
from amclip_ds.objectives.contrastive import cross_entropy


@dataclass
class Options(Weighted):
    temperature: float = 0.1
    """Of the softmax over candidates."""
    chunk: int = 0
    """Rows of logits held at a time, forward and backward; 0: all."""
    pairs_views: bool = True
    """False: each view with itself, as A-CLIP's published code."""
    exchange: str = "gather"
    """gather | ring: loss.exchange; views with themselves are gathered."""
    heads: HeadsConfig = field(default_factory=HeadsConfig)


class SimCLR(Objective):
    """NT-Xent between the two views, through a head on the class token."""

    Options = Options
    features = frozenset({"cls"})
    compiled_parts = ("normalised", "of_gathered")

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        heads = options.heads
        widths = [sizes.vision_width, heads.hidden_dim, heads.hidden_dim, heads.output_dim]
        self.head = MLPHead(widths, heads, bias=True)

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        assert features.cls is not None
        options = self.options
        projected = of_views(self.head, features.cls, comm.all_reduce_sum, options.heads)
        if options.exchange == "ring" and options.pairs_views:
            return {"o2o": ring.online_to_online(projected, options.temperature, comm, options.chunk)}
        rows = self.normalised(projected)
        everyone = gathered(rows, comm)
        of_gathered = online_to_online_of_gathered if options.chunk else self.of_gathered
        settings = options.temperature, comm.rank, options.pairs_views, options.chunk
        return {"o2o": of_gathered(rows, everyone, *settings)}

    def normalised(self, projected_VBP: Tensor) -> Tensor:
        """In fp32."""
        return normalise(projected_VBP)

    def of_gathered(self, *given: Any) -> Tensor:
        """online_to_online_of_gathered."""
        return online_to_online_of_gathered(*given)


def online_to_online(
    features_VBP: Tensor, temperature: float, comm: Comm, pairs_views: bool = True, chunk: int = 0
) -> Tensor:
    """NT-Xent between two views: 2 W B - 1 candidates a row, both directions averaged.

    pairs_views False pairs view 1 with itself, as A-CLIP's published code does: view 2 then gets no gradient.
    Collective: every rank must call.
    """
    features = normalise(features_VBP)
    return online_to_online_of_gathered(features, gathered(features, comm), temperature, comm.rank, pairs_views, chunk)


def gathered(features_VBP: Tensor, comm: Comm) -> Tensor:
    """All ranks' features [V, W * B, P]. Collective: every rank must call."""
    return comm.all_gather(features_VBP.transpose(0, 1).contiguous()).transpose(0, 1)


def online_to_online_of_gathered(
    features_VBP: Tensor, everyone: Tensor, temperature: float, rank: int, pairs_views: bool, chunk: int
) -> Tensor:
    """online_to_online of rows of unit length. everyone: those of all ranks, [2, W * B, P]."""
    V, B, _ = features_VBP.shape
    if V != 2:
        raise ValueError(f"loss.o2o_weight: this loss needs 2 views, not {V}")
    partner = 1 if pairs_views else 0
    labels = rank * B + torch.arange(B, device=features_VBP.device)
    total = features_VBP.new_zeros(())
    for own, other in ((0, partner), (partner, 0)):
        candidates = torch.cat([everyone[other], everyone[own]])
        itself = everyone.shape[1] + labels
        total = total + cross_entropy(features_VBP[own], candidates, labels, 1 / temperature, itself, chunk)
    return total / 2
