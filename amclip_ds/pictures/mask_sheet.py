"""`amclip masks`: what each mask keeps of some images, by the training path itself: crops, boxes, scores, selection.

Shapes: V views, B images, N patches of a view, K kept.
"""

import base64
import math
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from amclip_ds.config import TrainConfig
from amclip_ds.data import photometric
from amclip_ds.data.batch import Batch
from amclip_ds.data.loader import TrainingData
from amclip_ds.errors import UserError
from amclip_ds.evaluate.source import build_towers, locate
from amclip_ds.files import not_written, write_atomically
from amclip_ds.masks import MASKS, NONE
from amclip_ds.masks.text import TextMaskConfig
from amclip_ds.masks.units import num_units
from amclip_ds.method import Method, method_of
from amclip_ds.model.amclip import AClip, by_view
from amclip_ds.pictures import (
    captions_of,
    chosen,
    darkened,
    encoded,
    heat,
    of_one_picture,
    outlined,
    sheet,
    teachers_picture,
    thumbnail,
)
from amclip_ds.pictures.mask_statistics import object_boxes, object_share, patches_inside
from amclip_ds.report.page import fill
from amclip_ds.step import student_inputs, teachers_images


@dataclass
class Kept:
    """What one mask keeps of each view."""

    name: str
    by_view: list[Tensor]
    """[B, K]"""
    tokens: list[int]
    """kept of each view"""
    object_share: float | None
    """the mean share of an object's patches that stay, over the views that show any and lose any patch; None: no boxes,
    or nothing is removed"""
    note: str

    @property
    def about(self) -> str:
        """The first line of what its module says of it."""
        text = sys.modules[MASKS[self.name].priority.__module__].__doc__ or ""
        return text.strip().split("\n")[0]


def masks(source: Path, data: str, out: Path, images: int, names: list[str]) -> dict[str, Any]:
    """Writes OUT/masks.png and masks.html. Returns what --json holds. Raises UserError."""
    located = locate(source)
    if located.config is None:
        raise UserError(f"{source}: an export has no settings of views and masks; name the run or the checkpoint")
    weights = "teacher" if "teacher" in located.weights else "student"
    towers = build_towers(located, weights)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    try:
        batch, boxes = load_images(located.config, data, images, out)
    except UserError as error:
        if str(error).startswith("data.train: "):  # what the user typed is --data
            raise type(error)(f"--data: {str(error).removeprefix('data.train: ')}") from None
        raise
    method = method_of(located.config)
    scores = attention(towers, batch, method)
    found = [kept_by(name, method, towers, batch, scores, boxes) for name in names or MASKS]
    picture = draw(batch, scores, found, method, boxes)
    title = f"{source}: {weights}, step {located.step}"
    try:
        (out / "masks.png").write_bytes(encoded(picture))
        write_atomically(out / "masks.html", page(title, found, method, picture, batch))
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    return {
        "source": str(source),
        "weights": weights,
        "step": located.step,
        "images": len(batch.sample_ids),
        "patches": method.grid**2,
        "masks": {one.name: {"kept": one.tokens, "object_share": one.object_share} for one in found},
    }


def load_images(config: TrainConfig, data: str, images: int, scratch: Path) -> tuple[Batch, Tensor | None]:
    """The first samples of the training order over the shards, and the objects' boxes [B, 4] where all have one."""
    vision, method = config.model.vision, method_of(config)
    has_crop = method.teacher_view is None and not method.sees_views
    settings = replace(
        config.data,
        train=data,
        index=None,
        workers=0,
        weights=None,
        resampled=False,
        stage_dir="",
        exclude=None,  # of the run's own shards; its file and the table of words may be elsewhere by now
        text_mask=TextMaskConfig(),
    )
    with closing(
        TrainingData(
            settings,
            seed=config.run.seed,
            global_batch=1,
            rank=0,
            world_size=1,
            image_size=vision.image_size,
            teacher_size=config.teacher.image_size(vision.image_size) if has_crop else None,
            teacher_contains=method.compat.teacher_sees_views,
            draws_twice=True,
            num_units=max(num_units(vision.grid, mask.unit) for mask in method.masks),
            context_length=config.model.text.context_length,
            index_dir=scratch,
            say=lambda text: None,
        )
    ) as stream:
        batch = stream.first(images)
        return batch, object_boxes(stream.index, batch.sample_ids.tolist())


@torch.no_grad()
def attention(towers: AClip, batch: Batch, method: Method) -> Tensor:
    """How much the source's class token attends to each patch of what the run's teacher sees, fp32: of its crop [B, n],
    of all views [V, B, N]."""
    views = photometric.apply(batch.views_uint8, batch.photometric)
    return towers.attention(teachers_images(batch, views, method))


@torch.no_grad()
def kept_by(name: str, method: Method, towers: AClip, batch: Batch, scores: Tensor, boxes: Tensor | None) -> Kept:
    """What one mask keeps of the views, with the run's unit and ratio, as at the end of the run.

    A view that the run does not mask stays whole, unless it masks none. scores: as attention gives them.
    """
    masks = [mask.at(1.0) for mask in method.masks]
    masked = [view for view, mask in enumerate(masks) if mask.strategy != NONE] or list(range(len(masks)))
    note = ""
    if MASKS[name].disjoint and max(masks[view].keep_ratio for view in masked) > 1 / len(masked):
        note = f"keeps 1/{len(masked)}: views that share no token cannot keep more"
    for view in masked:
        mask, units = masks[view], num_units(method.grid, masks[view].unit)
        ratio = math.floor(units / len(masked)) / units if note else mask.keep_ratio
        masks[view] = replace(mask, strategy=name, keep_ratio=ratio)
    images = photometric.apply(batch.views_uint8, batch.photometric)
    inputs = student_inputs(batch, images, scores, replace(method, masks=tuple(masks)), progress=1.0)
    every = torch.arange(method.grid**2).expand(len(batch.sample_ids), -1)
    found = by_view(inputs.groups, chosen(inputs, towers.choose))
    kept = [every if rows is None else rows for rows in found]
    removing = [None if rows.shape[-1] == method.grid**2 else rows for rows in kept]
    return Kept(
        name,
        kept,
        [rows.shape[-1] for rows in kept],
        object_share(removing, boxes, batch.boxes[:-1], method.grid, batch.flips),
        note,
    )


def draw(batch: Batch, scores: Tensor, found: list[Kept], method: Method, boxes: Tensor | None) -> Image.Image:
    """The grid: the teacher's crop, its attention, then both views under each mask; a row an image."""
    inside = None if boxes is None else patches_inside(boxes, batch.boxes[:-1], method.grid, batch.flips)
    columns = [
        ("teacher's crop", [thumbnail(image) for image in teachers_picture(batch, method)]),
        ("its attention", [heat(row) for row in of_one_picture(scores)]),
    ]
    for one in found:
        for view, rows in enumerate(one.by_view):
            pictures = [
                thumbnail(darkened(image, rows[place], method.grid))
                for place, image in enumerate(batch.views_uint8[view])
            ]
            if inside is not None:
                pictures = [outlined(shown, inside[view, place], method.grid) for place, shown in enumerate(pictures)]
            columns.append((f"{one.name} {view + 1}", pictures))
    return sheet(columns, captions_of(batch), has_scores=True, has_boxes=inside is not None)


def page(title: str, found: list[Kept], method: Method, picture: Image.Image, batch: Batch) -> str:
    """One HTML file: the numbers as a table, the picture, and what its shades mean."""
    uri = "data:image/png;base64," + base64.b64encode(encoded(picture)).decode()
    return fill(
        "page.masks.html", title=title, found=found, patches=method.grid**2, uri=uri, captions=captions_of(batch)
    )
