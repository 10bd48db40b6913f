"""Made batches for the engine tests, the same samples in every world; and a mask that repeats given choices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclip_ds.data.batch import Batch
from amclip_ds.data.photometric import MEAN, NUM_COLUMNS, STD, Photometric
from amclip_ds.masks import MASKS, Mask, MaskInputs


def made_batch(views: Tensor, teacher: Tensor | None, noise: Tensor, token_ids: Tensor) -> Batch:
    """A batch of normalised images, without photometric changes; each view and the teacher see the whole image.

    views [V, B, 3, H, H], teacher [B, 3, h, h], noise [V, B, U], token_ids [B, T].
    """
    V, B, _, side, _ = views.shape
    boxes = torch.tensor([0.0, 0.0, side, side]).expand(V + 1, B, 4).clone()
    return Batch(
        views_uint8=as_pixels(views),
        teacher_uint8=None if teacher is None else as_pixels(teacher),
        boxes=boxes,
        photometric=Photometric(np.zeros((V, B, NUM_COLUMNS), dtype=np.float32)),
        mask_noise=noise,
        token_ids=token_ids,
        sample_ids=torch.arange(B),
        epoch=0,
        cursor={"epoch": 0, "step": 0},
    )


def as_pixels(images: Tensor) -> Tensor:
    """Normalised images on the scale of pixels, not rounded: another stream than the one whose near ties are known
    would move the table's cells (ADR 0091)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images * std + mean) * 255


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some samples of a batch."""
    return replace(
        batch,
        views_uint8=batch.views_uint8[:, rows],
        boxes=batch.boxes[:, rows],
        teacher_uint8=None if batch.teacher_uint8 is None else batch.teacher_uint8[rows],
        photometric=Photometric(batch.photometric.table[:, rows]),
        mask_noise=batch.mask_noise[:, rows],
        token_ids=batch.token_ids[rows],
        sample_ids=batch.sample_ids[rows],
    )


def local_part(batch: Batch, rank: int, world_size: int) -> Batch:
    """This rank's rows."""
    size = len(batch.sample_ids) // world_size
    return rows_of(batch, slice(rank * size, (rank + 1) * size))


def both(first: Batch, second: Batch) -> Batch:
    """The samples of two batches as one."""
    return replace(
        first,
        views_uint8=torch.cat([first.views_uint8, second.views_uint8], 1),
        teacher_uint8=torch.cat([first.teacher_uint8, second.teacher_uint8]),  # type: ignore[list-item]
        boxes=torch.cat([first.boxes, second.boxes], 1),
        photometric=Photometric(np.concatenate([first.photometric.table, second.photometric.table], 1)),
        mask_noise=torch.cat([first.mask_noise, second.mask_noise], 1),
        token_ids=torch.cat([first.token_ids, second.token_ids]),
        sample_ids=torch.cat([first.sample_ids, second.sample_ids]),
    )


def given(inputs: MaskInputs, options: Any) -> Tensor:
    """The mask `given`: keeps the units whose noise is 0, which `noise_of` makes of earlier keep_indices."""
    assert inputs.noise is not None
    return -inputs.noise


def noise_of(keep_indices: Tensor, grid: int) -> Tensor:
    """keep_indices [V, B, K] -> [V, B, U]: 0 for a unit of 2 x 2 patches that stays, 1 for the others."""
    unit = 2
    side = grid // unit
    units = keep_indices // grid // unit * side + keep_indices % grid // unit
    return torch.ones(*keep_indices.shape[:2], side * side).scatter_(-1, units, 0.0)


def watch(strategy: str, looked_at: Callable[[MaskInputs], object]) -> str:
    """Adds the mask `watched` to MASKS: as `strategy`, but it always gets scores, and `looked_at` sees its inputs."""
    masks = MASKS | {"given": Mask(given, frozenset({"noise"}))}

    def priority(inputs: MaskInputs, options: Any) -> Tensor:
        looked_at(inputs)
        return masks[strategy].priority(inputs, options)

    MASKS["watched"] = Mask(priority, masks[strategy].needs | {"scores"})
    return "watched"
