"""Patches of images as rows of a matrix, and the patch embedding as one product of it.

Shapes: B images, N patches, K kept, p a patch's side, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Conv2d):
    """The convolution of a timm PatchEmbed, which also takes patches that were cut out before."""

    @classmethod
    def become(cls, projection: nn.Module) -> None:
        """Gives the layer this forward in place: parameters and their names stay."""
        assert type(projection) is nn.Conv2d
        projection.__class__ = cls

    def forward(self, x: Tensor, table_TD: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] as a convolution takes them; or rows [B, K, 3 * p * p] -> [B, K, D].

        With a table of T places: the first row of each image is no patch, and row k has table[places[k]] added (no
        places: table[k]).
        """
        if x.dim() == 4:
            return super().forward(x)
        weight = self.weight.flatten(1)
        if table_TD is None:
            return F.linear(x, weight, self.bias)
        if self.bias is not None:
            table_TD = table_TD + F.pad(self.bias.expand(table_TD.shape[0] - 1, -1), (0, 0, 1, 0))
        if places is None:
            return F.linear(x, weight) + table_TD
        added = F.embedding(places, table_TD)
        return torch.addmm(added.flatten(0, 1), x.flatten(0, 1), weight.t()).view_as(added)


def rows_of(
    images: Tensor, patch: int, keep_indices: Tensor | None, dtype: torch.dtype, first_empty: bool = False
) -> Tensor:
    """[B, 3, H, W] -> [B, K, 3 * p * p], of the patches in keep_indices [B, K] (None: all), in dtype.

    The order within a row is a convolution's weight's. first_empty: a row of zeros before them, [B, 1 + K, ...].
    """
    B, C, height, width = images.shape
    down, across = height // patch, width // patch
    cut = images.reshape(B, C, down, patch, across, patch).permute(0, 2, 4, 1, 3, 5)
    if keep_indices is not None:
        image = torch.arange(B, device=images.device)[:, None]
        cut = cut[image, keep_indices // across, keep_indices % across]
    kept = down * across if keep_indices is None else keep_indices.shape[1]
    if not first_empty:
        return cut.reshape(B, kept, -1).to(dtype)
    rows = torch.empty(B, 1 + kept, C * patch * patch, dtype=dtype, device=images.device)
    rows[:, :1].zero_()
    rows[:, 1:].view(B, *cut.shape[1:-3], C, patch, patch).copy_(cut)
    return rows
