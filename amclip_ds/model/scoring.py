"""How much the teacher attends to each patch: the CLS row of its attention, and that map resampled to each view.

Shapes: B batch, V views, H heads, N patches, d width of a head, D width, g the teacher's grid, G the view's, U units.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_with_cls_row(attn: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """A timm Attention's output [B, T, D], and its CLS row summed over the heads [B, T] in fp32.

    Softmax runs over all T keys. Only the row of token 0 is formed; the attention itself stays SDPA's, so no T x T map
    exists. Every submodule is called (never its weight read), so that ZeRO-3 can gather it.
    """
    B, T, _ = x_BTD.shape
    qkv = attn.qkv(x_BTD).reshape(B, T, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1)
    return attn.proj(out), row_of(q[:, :, :1], k, attn.scale)


def row_of(q_BH1d: Tensor, k_BHTd: Tensor, scale: float) -> Tensor:
    """One query's attention over all keys, summed over the heads: [B, T] fp32."""
    q, k = q_BH1d.float() * scale, k_BHTd.float()
    if torch.compiler.is_compiling():  # one kernel reads the keys as they are; a product would need them in fp32 first
        logits_BHT = (q * k).sum(-1)
    else:
        logits_BHT = (q @ k.transpose(-2, -1)).squeeze(2)
    return logits_BHT.softmax(dim=-1).sum(dim=1)


def run_block_with_cls_row(block: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """timm Block.forward that also returns the CLS row of its attention, summed over the heads [B, T] fp32."""
    attended, row_BT = attend_with_cls_row(block.attn, block.norm1(x_BTD))
    x_BTD = x_BTD + block.ls1(attended)
    return x_BTD + block.ls2(block.mlp(block.norm2(x_BTD))), row_BT


def scores_to_views(scores_BN: Tensor, boxes: Tensor, grid: int, unit: int, flips: Tensor | None = None) -> Tensor:
    """The teacher's map seen from each view, one number per unit: [V, B, U] fp32.

    scores_BN: [B, g * g]. boxes: [V + 1, B, 4] (top, left, height, width) in source pixels, the teacher's last.
    flips: [V, B] bool, the views that are mirrored after the crop; None: none is.

    Bilinear (align_corners false, no antialias) from g x g to the teacher's box, cropped at the view (zeros outside the
    box), bilinear to the view's grid, mean over unit x unit. All of it is linear and separable, so a view is
    rows @ map @ columns^T with two small matrices per sample, and nothing of the size of an image exists. A teacher
    whose grid is no finer than the units (A-CLIP-eff) is resampled to the units at once.
    """
    B = scores_BN.shape[0]
    side = round(scores_BN.shape[1] ** 0.5)
    units = grid // unit
    size = units if side <= units else grid
    views, teacher = boxes[:-1].float(), boxes[-1:].float()
    rows = _resampling(
        views[..., 0] - teacher[..., 0], views[..., 2], teacher[..., 2].expand_as(views[..., 2]), side, size
    )
    columns = _resampling(
        views[..., 1] - teacher[..., 1], views[..., 3], teacher[..., 3].expand_as(views[..., 3]), side, size
    )
    maps = rows @ scores_BN.float().reshape(B, side, side) @ columns.transpose(-2, -1)  # [V, B, size, size]
    if size != units:
        maps = F.avg_pool2d(maps, kernel_size=unit)
    if flips is not None:
        maps = torch.where(flips[..., None, None], maps.flip(-1), maps)
    return maps.flatten(-2)


def _resampling(offset: Tensor, length: Tensor, box_length: Tensor, side: int, size: int) -> Tensor:
    """One axis of the resampling, [V, B, size, side], for views at offset [V, B] (pixels) in the teacher's box."""
    pixels, pixel_weights = _taps(torch.arange(size, device=offset.device).expand(*offset.shape, size), length, size)
    in_box = pixels + offset[..., None, None]
    inside = (in_box >= 0) & (in_box < box_length[..., None, None])
    pixel_weights = pixel_weights * inside
    centre = (in_box + 0.5) * (side / box_length)[..., None, None] - 0.5
    cells, cell_weights = _neighbours(centre, torch.full_like(centre, side))  # [V, B, size, 2, 2]
    weights = (pixel_weights[..., None] * cell_weights).flatten(-2)
    cells = cells.clamp(0, side - 1).long().flatten(-2)
    return torch.zeros(*offset.shape, size, side, device=offset.device).scatter_add_(-1, cells, weights)


def _taps(index: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Source pixels and weights [..., size, 2] of a bilinear resize from `length` pixels to `size`."""
    centre = (index + 0.5) * (length / size)[..., None] - 0.5
    return _neighbours(centre, length[..., None].expand_as(centre))


def _neighbours(centre: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbours of a position and their weights [..., 2], by torch's rule: clamped at both ends."""
    centre = centre.clamp(min=0)
    low = torch.minimum(centre.floor(), length - 1)
    high = torch.minimum(low + 1, length - 1)
    weight = (centre - low).clamp(max=1)
    return torch.stack([low, high], dim=-1), torch.stack([1 - weight, weight], dim=-1)
