"""Centered: a uniform draw plus a Gaussian over the view, so that the middle stays more often (GLIP, ECML 2024).

What the paper calls sigma 0.2 is the variance, on coordinates from -1 to 1, the outermost patches at +-1.
"""

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from amclip_ds.masks import MaskInputs


@dataclass
class Options:
    sigma2: float = 0.2
    """Variance of the Gaussian, on coordinates from -1 to 1; a smaller one keeps more of the middle."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma2 < math.inf:  # not a number is neither
            raise ValueError(f"mask.centered.sigma2: {self.sigma2} is not above 0")


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.noise is not None
    side = inputs.grid // inputs.unit
    return inputs.noise.double() + _density_on(inputs.noise.device, side, options.sigma2)


@functools.cache
def _density_on(device: "torch.device", side: int, sigma2: float) -> "Tensor":
    """The density as the CPU works it out, the same bits on every device; once a device, as it is a copy."""
    import torch

    with torch.inference_mode(False):
        return density(side, sigma2).to(device)


def density(side: int, sigma2: float) -> "Tensor":
    """The normal density of each of side x side units, [U] fp64, as published: not scaled to a sum of one."""
    import torch

    along = torch.linspace(-1, 1, side, dtype=torch.float64) if side > 1 else torch.zeros(1, dtype=torch.float64)
    squares = along.square()
    return (torch.exp(-(squares[:, None] + squares) / (2 * sigma2)) / (2 * math.pi * sigma2)).flatten()
