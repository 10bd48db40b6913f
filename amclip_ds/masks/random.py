"""Random: the smallest draws stay (FLIP, arXiv 2212.00794)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskInputs


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.noise is not None
    return -inputs.noise
