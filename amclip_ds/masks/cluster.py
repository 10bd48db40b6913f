"""Cluster: patches that look like a randomly drawn anchor go (E-CLIP, CVPR 2024); so does the anchor.

The published attention mask hides nothing, so what it trains on is K tokens, all attended: that is what is done here.
K is keep_ratio's, where the release takes what its local batch happens to leave. Only the anchors' rows of the
similarity are formed, never [U, U], and by products and sums in fp32: no TF32 rounds a similarity over a threshold.
Shapes: B rows, U units, A anchors, D numbers of a unit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amclip_ds.masks.units import joined

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskInputs

RULES = ("topk", "fill")


@dataclass
class Options:
    anchor_ratio: float = 0.03
    """Part of the units that are drawn as anchors."""
    rule: str = "topk"
    """topk: those least like their nearest anchor stay (the paper's aim) | fill: those under the threshold stay, then
    others by a second draw (the release)."""
    threshold: float = 0.5
    """fill: a unit is hidden where its similarity with an anchor is above this."""

    def __post_init__(self) -> None:
        check_anchors("cluster", self.anchor_ratio, self.rule, self.threshold)


def check_anchors(mask: str, anchor_ratio: float, rule: str, threshold: float) -> None:
    """Raises ValueError for options that this mask and pgs share."""
    if not 0 < anchor_ratio < 1:
        raise ValueError(f"mask.{mask}.anchor_ratio: {anchor_ratio} is outside (0, 1)")
    if rule not in RULES:
        raise ValueError(f"mask.{mask}.rule: {rule!r} is neither topk nor fill")
    if not 0 <= threshold <= 1:
        raise ValueError(f"mask.{mask}.threshold: {threshold} is outside [0, 1]")


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.pixels is not None and inputs.noise is not None and inputs.noise2 is not None
    chosen = anchors(inputs.noise, options.anchor_ratio)
    vectors = unit_length(joined(inputs.pixels, inputs.grid, inputs.unit))
    return by_rule(options, similarity_with(vectors, chosen), inputs.noise2)


def anchors(noise_BU: "Tensor", ratio: float) -> "Tensor":
    """[B, A]: the units with the largest draws, of equal ones the first; A = U - int(U (1 - ratio)), at least one."""
    U = noise_BU.shape[1]
    count = max(1, U - int(U * (1 - ratio)))
    return noise_BU.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def unit_length(vectors_BUD: "Tensor") -> "Tensor":
    """Each vector standardised by its own mean and unbiased variance, then of unit length; fp32.

    One whose numbers are all equal has no direction: it becomes 0, and is like nothing.
    """
    import torch.nn.functional as F

    centred = vectors_BUD.float() - vectors_BUD.float().mean(dim=-1, keepdim=True)
    return F.normalize(centred / (centred.var(dim=-1, keepdim=True) + 1e-6).sqrt(), dim=-1)


def similarity_with(vectors_BUD: "Tensor", anchors_BA: "Tensor") -> "Tensor":
    """[B, A, U]: the cosine of every unit with each anchor, one anchor at a time."""
    import torch

    rows = []
    for index in anchors_BA.unbind(1):
        anchor = vectors_BUD.take_along_dim(index[:, None, None], dim=1)
        rows.append((vectors_BUD * anchor).sum(-1))
    return torch.stack(rows, dim=1)


def by_rule(options: Any, similarity_BAU: "Tensor", noise2_BU: "Tensor") -> "Tensor":
    """Similarities with the anchors -> priorities [B, U], as options.rule says."""
    if options.rule == "topk":
        return -similarity_BAU.amax(dim=1)
    hidden = (similarity_BAU > options.threshold).any(dim=1)
    return -(hidden.to(noise2_BU.dtype) + noise2_BU)  # draws are in [0, 1): every visible unit comes first
