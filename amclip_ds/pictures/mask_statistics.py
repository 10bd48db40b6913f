"""What the masks of a run do, in numbers: how much stays, how sharp the scores are, how much of it two views share, and
how much of the object's tokens stay where the data say where it is.

Shapes: V views, B samples, N patches of a view, K kept.
"""

import json
from contextlib import closing
from itertools import permutations

import torch
from torch import Tensor

from amclip_ds.shards.index import Index
from amclip_ds.shards.reader import ShardReader

Kept = list[Tensor | None]
"""by view [B, K] tokens that stay; None: all"""


def of_step(
    kept: Kept, scores: Tensor | None, view_boxes: Tensor, grid: int, flips: Tensor | None = None
) -> dict[str, float]:
    """Of a step's samples. scores: the teacher's, [..., n]. view_boxes: [V, B, 4] (top, left, height, width).

    mask_kept: the mean share of the views' tokens that stays. mask_overlap, of two masked views and more: the share of
    one's kept patches whose centre is in a kept patch of the other. mask_score_entropy: 1 where the teacher attends
    to all patches alike, near 0 where to one.
    """
    masked = [view for view, rows in enumerate(kept) if rows is not None]
    if not masked:
        return {}
    shares = [1.0 if rows is None else rows.shape[-1] / grid**2 for rows in kept]
    found = {"mask_kept": sum(shares) / len(shares)}
    if len(masked) > 1:
        pairs = [overlap(one, other, kept, view_boxes, grid, flips) for one, other in permutations(masked, 2)]
        found["mask_overlap"] = float(torch.stack(pairs).mean())
    if scores is not None:
        shares_of = scores.float() / scores.float().sum(-1, keepdim=True)
        entropy = torch.special.entr(shares_of).sum(-1).mean()
        found["mask_score_entropy"] = float(entropy / torch.tensor(float(scores.shape[-1])).log())
    return found


def overlap(one: int, other: int, kept: Kept, view_boxes: Tensor, grid: int, flips: Tensor | None = None) -> Tensor:
    """The share, 0-d, of a view's kept patches whose centre is in a kept patch of another view of the same images.
    kept: a view's [B, K], or None; view_boxes: [V, B, 4] in source pixels; flips: [V, B] bool."""
    rows, columns = kept[one], kept[other]
    assert rows is not None and columns is not None
    y, x = (rows // grid + 0.5) / grid, (rows % grid + 0.5) / grid  # [B, K], of the view's sides
    x = _mirrored(x, flips, one)
    top, left, height, width = (edge[:, None] for edge in view_boxes[one].float().unbind(-1))
    y, x = top + y * height, left + x * width  # source pixels
    top, left, height, width = (edge[:, None] for edge in view_boxes[other].float().unbind(-1))
    y, x = (y - top) / height, (x - left) / width
    is_inside = (y >= 0) & (y < 1) & (x >= 0) & (x < 1)
    x = _mirrored(x, flips, other)
    cell = (y * grid).floor().clamp(0, grid - 1).long() * grid + (x * grid).floor().clamp(0, grid - 1).long()
    stays = torch.zeros(len(columns), grid * grid, dtype=torch.bool, device=columns.device).scatter_(1, columns, True)
    return (stays.gather(1, cell) & is_inside).float().mean()


def _mirrored(x: Tensor, flips: Tensor | None, view: int) -> Tensor:
    return x if flips is None else torch.where(flips[view][:, None], 1 - x, x)


def object_boxes(index: Index, sample_ids: list[int]) -> Tensor | None:
    """[B, 4] top, left, height, width in source pixels, from each sample's json; None unless every one has it."""
    found = []
    with closing(ShardReader()) as reader:
        for sample in map(index.sample, sample_ids):
            if sample.json is None:
                return None
            try:
                facts = json.loads(reader.read_many(sample.shard, [sample.json])[0])
            except (ValueError, OSError, RecursionError):
                return None
            box = facts.get("box") if isinstance(facts, dict) else None
            if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) for x in box):
                return None
            found.append(box)
    return torch.tensor(found, dtype=torch.float32)


def object_share(
    kept: Kept, objects: Tensor | None, view_boxes: Tensor, grid: int, flips: Tensor | None = None
) -> float | None:
    """The mean share of the objects' patches that stay, over the masked views that show any. objects: [B, 4]."""
    masked = [view for view, rows in enumerate(kept) if rows is not None]
    if objects is None or not masked:
        return None
    flips = None if flips is None else flips[masked]
    inside = patches_inside(objects, view_boxes[masked], grid, flips)
    stays = torch.stack(
        [
            torch.zeros_like(seen).scatter_(-1, rows, True)
            for seen, rows in zip(inside, (rows for rows in kept if rows is not None))
        ]
    )
    shown = inside.sum(-1)
    if not bool((shown > 0).any()):
        return None
    return float(((stays & inside).sum(-1)[shown > 0] / shown[shown > 0]).mean())


def patches_inside(object_boxes: Tensor, view_boxes: Tensor, grid: int, flips: Tensor | None = None) -> Tensor:
    """[B, 4] objects and [V, B, 4] views (top, left, height, width, in source pixels) -> [V, B, grid * grid] bool.

    flips: [V, B] bool, the views that are mirrored after the crop.
    """
    centres = (torch.arange(grid) + 0.5) / grid
    top, left, height, width = view_boxes.unbind(-1)
    y = top[..., None] + centres * height[..., None]  # [V, B, grid]
    x = left[..., None] + centres * width[..., None]
    object_top, object_left, object_height, object_width = (edge[:, None] for edge in object_boxes.unbind(-1))
    in_rows = (y >= object_top) & (y < object_top + object_height)
    in_columns = (x >= object_left) & (x < object_left + object_width)
    if flips is not None:
        in_columns = torch.where(flips[..., None], in_columns.flip(-1), in_columns)
    return (in_rows[..., :, None] & in_columns[..., None, :]).flatten(-2)
