"""The arithmetic of units: blocks of unit x unit patches that stay or go together. Loads no torch."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskConfig

NONE = "none"  # the strategy that keeps every token: no mask


def num_units(grid: int, unit: int) -> int:
    """Units of a grid x grid map. Raises ValueError where the unit does not divide the grid."""
    if grid % unit:
        raise ValueError(
            f"mask.unit: {unit} does not divide the patch grid of {grid} x {grid}; set it to 1, or another"
            f" model.vision.image_size"
        )
    return (grid // unit) ** 2


def num_kept_units(units: int, keep_ratio: float) -> int:
    """Units kept of `units`: the next whole number, which is the published int(49 r) + 1 at its 49 blocks."""
    return max(1, math.ceil(units * keep_ratio - 1e-9))  # 0.1 * 30 is 3.0000000000000004


def num_kept(config: "MaskConfig", grid: int) -> int:
    """Patch tokens kept of grid x grid (CLS comes on top of them)."""
    if config.strategy == NONE:
        return grid * grid
    return num_kept_units(num_units(grid, config.unit), config.keep_ratio) * config.unit**2


def pool(values_BN: "Tensor", grid: int, unit: int) -> "Tensor":
    """One number a patch -> its mean over each unit: [B, N] -> [B, U]."""
    side = grid // unit
    return values_BN.reshape(-1, side, unit, side, unit).mean(dim=(2, 4)).flatten(1)


def joined(values_BND: "Tensor", grid: int, unit: int) -> "Tensor":
    """The numbers of a unit's patches side by side: [B, N, D] -> [B, U, unit^2 * D]."""
    side, width = grid // unit, values_BND.shape[-1]
    blocks = values_BND.reshape(-1, side, unit, side, unit, width).transpose(2, 3)
    return blocks.reshape(-1, side * side, unit * unit * width)
