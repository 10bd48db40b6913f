"""From an encoded image to the crops of the student's views and the teacher, out of one decode, as uint8."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from amclip_ds.data.boxes import draw_boxes
from amclip_ds.data.config import View
from amclip_ds.images import MAX_PIXELS, Decoded, Scratch, open_image


@dataclass
class Views:
    """What the crops of one sample are of. V views."""

    boxes: np.ndarray
    """[V + 1, 4] float32, in pixels of the upright image at full scale"""
    damaged: str = field(default="")


class ViewMaker:
    """Makes the crops of one image after another, in memory that it keeps."""

    def __init__(self) -> None:
        self._pixels, self._region = Scratch(), Scratch()

    def make(
        self,
        content: bytes,
        random: np.random.Generator,
        views: Sequence[View],
        crops: Sequence[Tensor],
        teacher_contains: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> Views:
        """Writes the crops of one encoded image, not mirrored yet. teacher_contains: boxes.draw_boxes. Raises BadImage.

        crops: a [1, 3, S, S] uint8 for each view, and [1, 3, s, s] for the teacher where there is one; quickest where
        a pixel's colours are beside each other in memory (see `planes`).
        """
        source = open_image(content, max_pixels)
        boxes = draw_boxes(random, source.height, source.width, views, teacher_contains)
        reduction = min(min(box[2:]) / crop.shape[-1] for box, crop in zip(boxes.tolist(), crops))
        decoded = source.decode(reduction, self._pixels)
        boxes = _on_grid(boxes, decoded)
        for place, (box, crop) in enumerate(zip(boxes.tolist(), crops)):
            repeated = views[place].draws_of if place < len(views) else None
            if repeated is None:
                self._crop(decoded, box, crop)
            else:
                crop.copy_(crops[repeated])
        return Views(boxes, decoded.damaged)

    def _crop(self, decoded: Decoded, box: Sequence[float], crop: Tensor) -> None:
        """Fills crop [1, 3, side, side] with the box, resized (bilinear, antialiased) as F.interpolate does it.

        Its operator is called with its result's memory, for in the decoder's order of colours it need not sort them
        into planes, which takes a third of its time. Of a part of an image it makes a copy, in new memory each time:
        so it gets one.
        """
        factor, size = decoded.factor, crop.shape[-2:]
        top, left, height, width = map(int, box)
        bottom, right = -(-(top + height) // factor), -(-(left + width) // factor)
        part = decoded.pixels[top // factor : bottom, left // factor : right]
        if part.flags.c_contiguous:
            region = part
        else:
            region = self._region.take(*part.shape)
            np.copyto(region, part)
        source = torch.from_numpy(region.transpose(2, 0, 1)[None])
        if source.shape == crop.shape:
            crop.copy_(source)
        else:
            resize = torch._C._nn._upsample_bilinear2d_aa  # typed without its second form
            resize(source, size, False, None, None, out=crop)  # type: ignore[call-arg]


def planes(pixels: Tensor) -> Tensor:
    """Memory of [..., H, W, 3] as [..., 3, H, W]."""
    return pixels.movedim(-1, -3)


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
