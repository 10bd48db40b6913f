"""The heads that self-supervised objectives put on features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from amclip_ds.model.batch_norm import BatchNorm
from amclip_ds.model.config import HeadsConfig


def of_views(
    head: "MLPHead", views_VBD: Tensor, all_reduce_sum: Callable[[Tensor], Tensor], config: HeadsConfig
) -> Tensor:
    """[V, B, in] -> [V, B, out]: the views in one batch of the norm, or each in its own, one after the other.

    Collective with batch norm: every rank must call.
    """
    if config.norm_by == "view":
        return torch.stack([head(view, all_reduce_sum) for view in views_VBD])
    return head(views_VBD.flatten(0, 1), all_reduce_sum).unflatten(0, views_VBD.shape[:2])


class MLPHead(nn.Module):
    """Linear, norm, ReLU, ..., Linear: one head, `layers` numbered as in an nn.Sequential."""

    compiled_parts = ("stage",)

    def __init__(self, widths: list[int], config: HeadsConfig, bias: bool) -> None:
        """widths: input, hidden ..., output."""
        super().__init__()
        self.layers = nn.ModuleList()
        for before, after in zip(widths[:-2], widths[1:-1]):
            norm = BatchNorm(after, config.norm_momentum) if config.norm == "batch" else nn.LayerNorm(after)
            self.layers.extend([nn.Linear(before, after, bias=bias), norm, nn.ReLU()])
        self.layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))

    def forward(self, x: Tensor, all_reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, in] -> [B, out]. Collective with batch norm: every rank must call.

        all_reduce_sum must carry gradients (its backward sums over the ranks).
        """
        total = None
        for place in range(0, len(self.layers), 3):
            x, sums = self.stage(place, x, total)
            total = None if sums is None else all_reduce_sum(sums)
        return x

    def stage(self, place: int, x: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """From one collective to the next: the norm and the ReLU before the Linear at `place`, that, and what the norm
        behind it needs of all ranks. total: the same of the norm before, summed over the ranks."""
        if place:
            norm, relu = self.layers[place - 2], self.layers[place - 1]
            x = relu(norm(x, total) if isinstance(norm, BatchNorm) else norm(x))
        x = self.layers[place](x)
        after = self.layers[place + 1] if place + 1 < len(self.layers) else None
        return x, after.sums(x) if isinstance(after, BatchNorm) else None
