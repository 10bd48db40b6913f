"""Which patch tokens stay: strategies that return keep_indices, and the module that removes the others.

Shapes: ... leading dimensions (views, samples), B batch, N patches, K kept, U units (blocks of unit x unit patches),
D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amclip_ds.model.config import MaskConfig, num_kept_units, num_units


def _by_noise(scores: Tensor | None, noise: Tensor | None) -> Tensor:
    """Random: the smallest draws stay (FLIP)."""
    assert noise is not None, "mask.strategy random needs noise"
    return -noise


def _by_score(scores: Tensor | None, noise: Tensor | None) -> Tensor:
    """Attentive: what the teacher attends to stays (A-CLIP)."""
    assert scores is not None, "mask.strategy attentive needs scores"
    return scores


def _by_inverse_score(scores: Tensor | None, noise: Tensor | None) -> Tensor:
    """The paper's ablation: what the teacher attends to goes."""
    assert scores is not None, "mask.strategy attentive_inverse needs scores"
    return -scores


# How much a unit deserves to stay [..., U], from its score and its random draw [..., U]; None keeps everything.
STRATEGIES: dict[str, Callable[[Tensor | None, Tensor | None], Tensor] | None] = {
    "none": None,
    "random": _by_noise,
    "attentive": _by_score,
    "attentive_inverse": _by_inverse_score,
}


def select(config: MaskConfig, grid: int, scores: Tensor | None = None, noise: Tensor | None = None) -> Tensor | None:
    """The tokens that stay, [..., K] ascending int64, K the same for every sample; None where everything stays.

    scores, noise: one number per unit, [..., U], units in row-major order. Equal ones: the first unit wins, so that the
    choice is the same on every machine. noise is drawn by the caller, keyed by sample: nothing random happens here.
    """
    strategy = STRATEGIES[config.strategy]
    if strategy is None:
        return None
    worth = strategy(scores, noise)
    if worth.shape[-1] != num_units(grid, config.unit):
        raise ValueError(f"mask.unit: {worth.shape[-1]} units given for a grid of {grid} and a unit of {config.unit}")
    kept = num_kept_units(worth.shape[-1], config.keep_ratio)
    units = worth.sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return tokens_of_units(units, grid, config.unit).sort(dim=-1).values


def tokens_of_units(units: Tensor, grid: int, unit: int) -> Tensor:
    """The tokens of the given units: [..., k] -> [..., k * unit^2], in no particular order."""
    side = grid // unit
    corner = (units // side) * unit * grid + (units % side) * unit
    within = torch.arange(unit, device=units.device)
    offsets = (within[:, None] * grid + within[None, :]).flatten()
    return (corner[..., None] + offsets).flatten(-2)


def gather_tokens(x_BND: Tensor, keep_indices_BK: Tensor) -> Tensor:
    """x_BND at keep_indices_BK: [B, K, D]."""
    return x_BND.gather(1, keep_indices_BK[..., None].expand(-1, -1, x_BND.shape[-1]))


class TokenMask(nn.Module):
    """Removes patch tokens between patch embedding and blocks; removed tokens vanish, there is no mask token."""

    def forward(self, x_BND: Tensor, keep_indices_BK: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, K, D]; without keep_indices everything stays."""
        return x_BND if keep_indices_BK is None else gather_tokens(x_BND, keep_indices_BK)
