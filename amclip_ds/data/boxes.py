"""Where the views are cut: random crops for the student and the teacher's crop that should contain them.

A box is (top, left, height, width) in pixels of the upright image.
"""

import math
from collections.abc import Sequence

import numpy as np

from amclip_ds.data.config import RATIO, SCALE, View

Box = tuple[int, int, int, int]


def draw_boxes(
    random: np.random.Generator, height: int, width: int, views: Sequence[View], contains_views: bool = True
) -> np.ndarray:
    """[V + 1, 4] float32: the views' boxes, then the teacher's.

    A box is drawn for every view, also for one that takes another's, so that the others' do not depend on it.
    contains_views: the teacher's box contains every view; False: as the published code draws it, which leaves part of a
    view outside in about 7 of 10 samples.
    """
    drawn = [random_resized_crop(random, height, width, view.scale, view.ratio) for view in views]
    boxes = [drawn[place if view.draws_of is None else view.draws_of] for place, view in enumerate(views)]
    enlarge = enlarged_union if contains_views else enlarge_as_released
    return np.array([*boxes, enlarge(random, boxes, height, width)], dtype=np.float32)


def random_resized_crop(
    random: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = SCALE,
    bounds: tuple[float, float] = RATIO,
) -> Box:
    """torchvision's RandomResizedCrop.get_params: ten tries at an area and a ratio, then the central crop."""
    area = height * width
    tries = random.random((10, 4))  # always as many, so that what follows does not depend on how many were needed
    low, high = math.log(bounds[0]), math.log(bounds[1])
    for part, ratio, down, across in tries.tolist():
        target = area * (scale[0] + (scale[1] - scale[0]) * part)
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
    aspect = width / height
    h, w = height, width
    if aspect < bounds[0]:
        h = min(height, max(1, round(width / bounds[0])))
    elif aspect > bounds[1]:
        w = min(width, max(1, round(height * bounds[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def enlarged_union(random: np.random.Generator, views: list[Box], height: int, width: int) -> Box:
    """The smallest box around the views, each side moved outwards by a uniform draw up to the image's edge."""
    top, left = min(box[0] for box in views), min(box[1] for box in views)
    bottom, right = max(box[0] + box[2] for box in views), max(box[1] + box[3] for box in views)
    top, left = _between(random, 0, top), _between(random, 0, left)
    bottom, right = _between(random, bottom, height), _between(random, right, width)
    return top, left, bottom - top, right - left


def enlarge_as_released(random: np.random.Generator, views: list[Box], height: int, width: int) -> Box:
    """The published code's box, with its two slips: the second view's HEIGHT is taken for its left edge, and the corner
    moves outwards while height and width are drawn as if it had not."""
    first, second = views[0], views[-1]
    top, left = min(first[0], second[0]), min(first[1], second[2])
    h = max(first[0] + first[2], second[0] + second[2]) - top
    w = max(first[1] + first[3], second[1] + second[3]) - left
    top, left = _between(random, 0, top), _between(random, 0, left)
    return top, left, _between(random, h, height - top), _between(random, w, width - left)


def _between(random: np.random.Generator, low: int, high: int) -> int:
    """A uniform whole number in [low, high]. Draws one number regardless of the range."""
    return low + int(random.random() * (high - low + 1))
