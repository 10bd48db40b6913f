"""Masked patches: at the places that were removed, a small decoder predicts what the teacher sees there.

MaskCLIP's image loss (arXiv 2208.12262, from the paper's description: its code was never released), with the target of
feature distillation (arXiv 2205.14141): the teacher's tokens, each whitened. It needs no prototypes and no centre.
Shapes: B samples, N patches, K kept, D width.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import PatchesOptions
from amclip_ds.model.features import Features, Seen, Terms
from amclip_ds.model.init import normal
from amclip_ds.objectives.base import Objective

HEAD_WIDTH, MLP_RATIO = 64, 4.0
BETA = 2.0  # where the squared error becomes a linear one


class Patches(Objective):
    """Smooth L1 between the decoder's predictions and the teacher's whitened tokens, at the removed places of a view.

    The teacher must look at that view itself (teacher.view), so that places agree.
    """

    Options = PatchesOptions
    features = frozenset({"cls", "patches"})
    targets = frozenset({"patches"})
    views = (1,)
    init = {r"decoder\.mask_token": normal(0.02)}

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        width = sizes.vision_width
        heads = max(1, width // HEAD_WIDTH)
        self.decoder = PatchDecoder(
            width, sizes.grid, options.depth, nn.Linear(width, width), heads if width % heads == 0 else 1
        )

    def observe(self, copies: nn.ModuleDict, seen: Seen, comm: Comm) -> tuple[Tensor, ...]:
        assert seen.patches is not None
        return (whitened(seen.patches),)

    def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
        assert features.cls is not None and features.patches is not None and features.keep_indices is not None
        losses = []
        for cls, patches, keep in zip(features.cls, features.patches, features.keep_indices):
            if keep is None:
                raise UserError("loss.patches.weight: a view of loss.patches.views keeps every token; give it a mask")
            predicted, removed = self.decoder(cls, patches, keep)
            losses.append(smooth_l1(predicted, targets[0].take_along_dim(removed[..., None], 1)))
        return {"patches": torch.stack(losses).mean()}


class PatchDecoder(nn.Module):
    """Kept tokens, mask tokens at the other places, fixed sine-cosine positions, a few blocks."""

    def __init__(self, width: int, grid: int, depth: int, output: nn.Module, heads: int, by_axis: bool = False) -> None:
        """output: makes predictions of the last norm's tokens. by_axis: see positions."""
        super().__init__()
        from timm.models.vision_transformer import Block

        self.grid, self.by_axis = grid, by_axis
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, MLP_RATIO, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = output

    def forward(self, cls_BD: Tensor, patches_BKD: Tensor, keep_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [B, N - K, D] and the removed places [B, N - K], ascending."""
        removed = removed_places(keep_BK, self.grid**2)
        left = self.tokens(cls_BD, patches_BKD, keep_BK).take_along_dim(removed[..., None], 1)
        return self.head(self.norm(left)), removed

    def tokens(self, cls_BD: Tensor, patches_BKD: Tensor, keep_BK: Tensor) -> Tensor:
        """Of every place, before the last norm: [B, N, D]."""
        B, N = keep_BK.shape[0], self.grid**2
        x = self.embed(torch.cat([cls_BD[:, None], patches_BKD], dim=1))
        places = keep_BK[..., None].expand(-1, -1, x.shape[-1])
        full = self.mask_token.to(x.dtype).expand(B, N, -1).scatter(1, places, x[:, 1:])
        x = torch.cat([x[:, :1], full + positions(self.grid, x, self.by_axis)], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


def positions(grid: int, like: Tensor, by_axis: bool = False) -> Tensor:
    """[N, D] of the 2-D sine-cosine table. by_axis: first the channels of columns, then those of rows; else sines of
    both, then cosines."""
    return _table(grid, like.shape[-1], by_axis, like.device, like.dtype)


@functools.cache  # some twenty launches for each view of a step
def _table(grid: int, width: int, by_axis: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    from timm.layers import build_sincos2d_pos_embed

    with torch.inference_mode(False):
        table = build_sincos2d_pos_embed([grid, grid], dim=width, device=device)
        if by_axis:
            sines_y, sines_x, cosines_y, cosines_x = table.chunk(4, dim=-1)
            table = torch.cat([sines_x, cosines_x, sines_y, cosines_y], dim=-1)
        return table.to(dtype)


def removed_places(keep_BK: Tensor, N: int) -> Tensor:
    """[B, N - K], ascending."""
    is_removed = torch.ones(keep_BK.shape[0], N, dtype=torch.int8, device=keep_BK.device).scatter(1, keep_BK, 0)
    return is_removed.sort(dim=1, descending=True, stable=True).indices[:, : N - keep_BK.shape[1]]


def whitened(tokens: Tensor) -> Tensor:
    """Each token minus its mean, over its deviation: layer norm without weights, in fp32; in the tokens' dtype."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-5).to(tokens.dtype)


def smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean over everything of |d| < 2: d^2 / 4, else |d| - 1; in fp32."""
    return F.smooth_l1_loss(predicted.float(), target.float(), beta=BETA)
