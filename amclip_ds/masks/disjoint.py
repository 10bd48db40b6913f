"""Disjoint: of one order by chance, the first view takes the first K, the second the next K (OCL, 2024).

For views of the same crop (data.views.1.same_crop_as=0): they then share no patch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskInputs


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    """The first view's draws, for every view: the smallest come first."""
    assert inputs.noise is not None
    first = inputs.noise.unflatten(0, (inputs.num_views, -1))[:1]
    return -first.expand(inputs.num_views, -1, -1).flatten(0, 1)
