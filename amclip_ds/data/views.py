"""From an encoded image to the crops of the student's views and the teacher, out of one decode, as uint8."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.data.boxes import draw_boxes
from amclip_ds.data.config import View
from amclip_ds.images import MAX_PIXELS, Decoded, open_image


@dataclass
class Views:
    """One sample's crops. V views, S their side, s the teacher's."""

    views: np.ndarray
    """[V, 3, S, S] uint8"""
    teacher: np.ndarray | None
    """[3, s, s] uint8"""
    boxes: np.ndarray
    """[V + 1, 4] float32, in pixels of the upright image at full scale"""
    mended: str = field(default="")


def make_views(
    content: bytes,
    random: np.random.Generator,
    views: Sequence[View],
    size: int,
    teacher_size: int | None,
    teacher_contains: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Views:
    """The crops of one encoded image, not mirrored yet. teacher_contains: boxes.draw_boxes. Raises BadImage."""
    source = open_image(content, max_pixels)
    boxes = draw_boxes(random, source.height, source.width, views, teacher_contains)
    sides = [size] * len(views) + ([teacher_size] if teacher_size else [])
    reduction = min(min(box[2], box[3]) / side for box, side in zip(boxes, sides))
    decoded = source.decode(float(reduction))
    boxes = _on_grid(boxes, decoded)
    pixels = torch.from_numpy(decoded.pixels)
    crops: list[Tensor] = []
    for place, (box, side) in enumerate(zip(boxes, sides)):
        repeated = views[place].draws_of if place < len(views) else None
        crops.append(_crop(pixels, box, decoded.factor, side) if repeated is None else crops[repeated])
    made = torch.stack(crops[: len(views)]).numpy()
    return Views(made, crops[-1].numpy() if teacher_size else None, boxes, decoded.mended)


def _on_grid(boxes: np.ndarray, decoded: Decoded) -> np.ndarray:
    """The boxes moved to the nearest edges of the decoded pixels, so that what is cut is exactly what they say.

    Only where the pixels are reduced, and then by less than one pixel of the crop. What contained another still does.
    """
    if decoded.factor == 1:
        return boxes
    limits = np.array([decoded.height, decoded.width], dtype=np.float32)
    first = np.floor(boxes[:, :2] / decoded.factor + 0.5) * decoded.factor
    last = np.minimum(np.floor((boxes[:, :2] + boxes[:, 2:]) / decoded.factor + 0.5) * decoded.factor, limits)
    first = np.minimum(first, np.floor((limits - 1) / decoded.factor) * decoded.factor)
    last = np.maximum(last, np.minimum(first + decoded.factor, limits))
    return np.concatenate([first, last - first], axis=1)


def _crop(pixels: Tensor, box: np.ndarray, factor: int, side: int) -> Tensor:
    """[3, side, side] uint8: the box, resized (bilinear, antialiased)."""
    top, left = int(box[0]) // factor, int(box[1]) // factor
    bottom, right = -(-int(box[0] + box[2]) // factor), -(-int(box[1] + box[3]) // factor)
    region = pixels[top:bottom, left:right].permute(2, 0, 1)[None]
    if region.shape[-2:] == (side, side):
        return region[0].contiguous()
    return F.interpolate(region, size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
