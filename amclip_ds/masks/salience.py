"""Salience: what most other patches resemble, a draw added (SBAM, ECCV 2024); and the same with the teacher's scores.

SBAM removes the salient, for reconstruction. For CLIP that is the bad direction (A-CLIP's ablation: 28.5 against 39.5):
`keeps` turns it round, and attentive_noise, which keeps what the teacher attends to, is the useful half.
Shapes: B rows, N patches, U units, D width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amclip_ds.masks.units import pool

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskInputs


@dataclass
class Options:
    keeps: str = "plain"
    """plain: the salient are removed, as published | salient: they stay."""
    noise: float = 0.5
    """Weight of the uniform draw, against a salience from 0 to 1 in each view."""

    def __post_init__(self) -> None:
        _check("salience", self)


@dataclass
class AttentiveOptions(Options):
    keeps: str = "salient"
    """salient: what the teacher attends to stays | plain: it is removed."""

    def __post_init__(self) -> None:
        _check("attentive_noise", self)


def _check(mask: str, options: Options) -> None:
    if options.keeps not in ("plain", "salient"):
        raise ValueError(f"mask.{mask}.keeps: {options.keeps!r} is neither plain nor salient")
    if options.noise < 0:
        raise ValueError(f"mask.{mask}.noise: {options.noise} must be 0 or more")


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.patches is not None and inputs.noise is not None
    return with_noise(pool(salience(inputs.patches), inputs.grid, inputs.unit), inputs.noise, options)


def attentive(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.scores is not None and inputs.noise is not None
    return with_noise(inputs.scores, inputs.noise, options)


def with_noise(salience_BU: "Tensor", noise_BU: "Tensor", options: Any) -> "Tensor":
    sign = 1 if options.keeps == "salient" else -1
    return sign * from_0_to_1(salience_BU) - options.noise * noise_BU


def salience(tokens_BND: "Tensor") -> "Tensor":
    """[B, N] fp32: how much attention each token gets from all, by softmax of their products, unscaled."""
    tokens = tokens_BND.float()
    return (tokens @ tokens.transpose(1, 2)).softmax(dim=-1).sum(dim=1)


def from_0_to_1(values_BU: "Tensor", least: float = 1e-12) -> "Tensor":
    """Each row moved and scaled to [0, 1]; a row of equal values becomes 0. least: added to the range."""
    low, high = values_BU.amin(-1, keepdim=True), values_BU.amax(-1, keepdim=True)
    return (values_BU - low) / (high - low + least)
