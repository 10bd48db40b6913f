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

    def __init__(self, widths: list[int], config: HeadsConfig, bias: bool) -> None:
        """widths: input, hidden ..., output."""
        super().__init__()
        self.layers = nn.ModuleList()
        for before, after in zip(widths[:-2], widths[1:-1]):
            norm = BatchNorm(after, config.norm_momentum) if config.norm == "batch" else nn.LayerNorm(after)
            self.layers.extend([nn.Linear(before, after, bias=bias), norm, nn.ReLU()])
        self.layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))

    def forward(self, x: Tensor, all_reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, in] -> [B, out]. Collective with batch norm: every rank must call."""
        for layer in self.layers:
            x = layer(x, all_reduce_sum) if isinstance(layer, BatchNorm) else layer(x)
        return x
