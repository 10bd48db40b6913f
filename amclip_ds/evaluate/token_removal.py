"""`amclip eval --keep-ratio`: images of which a random share of the patches is encoded, and rows that say so.

Which patches stay is a random mask's choice (masks/random.py, unit 1), drawn from the image's place in its set alone:
the same on any number of ranks, at any batch size, for every model and at every step.
Shapes: B images, N patches of an image.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from amclip_ds import config as settings
from amclip_ds import hub
from amclip_ds.errors import UserError
from amclip_ds.evaluate.rows import rename
from amclip_ds.evaluate.source_kind import CHECKPOINT, RUN, kind_of
from amclip_ds.keyed_random import keyed
from amclip_ds.masks import MaskConfig, MaskInputs
from amclip_ds.masks.selection import Selection
from amclip_ds.masks.units import num_kept

SEED = 0


def mask_of(keep_ratio: float) -> MaskConfig:
    """The mask that removes the patches."""
    return MaskConfig("random", keep_ratio, unit=1)


def check(source: str, keep_ratio: float) -> str:
    """How many patches of an image stay, in words. Raises UserError for an export, or where no patch would."""
    path = hub.local(source)
    kind = kind_of(path)
    if kind not in (RUN, CHECKPOINT):
        raise UserError(
            f"--keep-ratio: {path} is an export ({kind}); name the run or the checkpoint that it was made of"
        )
    model = settings.model_of_run(path)
    if model is None:
        raise UserError(f"{path}: no config.yaml in it or in its run")
    patches = model.vision.grid**2
    if patches * keep_ratio < 1 - 1e-9:
        raise UserError(f"--keep-ratio {keep_ratio}: of {patches} patches not one stays; at least {1 / patches:.4g}")
    return f"{num_kept(mask_of(keep_ratio), model.vision.grid)} of {patches} patches of each image, drawn at random"


def selection(keep_ratio: float, grid: int, numbers: Sequence[int], rows: int, device: torch.device) -> Selection:
    """The patches that stay of a batch. numbers: of its images in their set; rows: images in it, B, those that fill it
    up too."""
    noise = np.zeros((rows, grid**2), np.float32)
    for row, number in zip(noise, numbers):
        row[:] = keyed(SEED, "evaluation", number).random(grid**2, np.float32)
    return Selection(mask_of(keep_ratio), MaskInputs(grid, 1, 1, noise=torch.from_numpy(noise).to(device)))


def mark(rows: Iterable[dict[str, Any]], keep_ratio: float) -> None:
    """Puts the ratio into the rows and into the names of their sets."""
    for row in rows:
        row["keep_ratio"] = keep_ratio
        rename(row, f"keep={keep_ratio}")
