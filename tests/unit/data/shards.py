"""Small shards for the tests of data: known keys, captions and images."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from amclip_ds.data.config import DataConfig, View
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.views import ViewMaker, planes

UNEVEN = (37, 1, 64, 20, 53)  # samples of the shards


def jpeg(seed: int = 0, width: int = 24, height: int = 20, quality: int = 90) -> bytes:
    """A small picture with some structure, different for each seed."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return encode(small.resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=quality)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file's content."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar with these members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, sizes: tuple[int, ...] = UNEVEN, **picture: int) -> list[str]:
    """Shards 0.tar, 1.tar, ... of so many samples; caption and json show shard and number."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, size in enumerate(sizes):
        members = {}
        for number in range(size):
            key = f"{shard}_{number:04d}"
            members[f"{key}.jpg"] = jpeg(seed=1000 * shard + number, **picture)
            members[f"{key}.txt"] = f"picture {number} of shard {shard}".encode()
            members[f"{key}.json"] = json.dumps({"title": f"t{number}", "captions": ["a", "b"]}).encode()
        paths.append(str(write_tar(folder / f"{shard}.tar", members)))
    return paths


def open_data(train: str | Path, **changes: Any) -> TrainingData:
    """TrainingData at a tiny size; `changes` go to its arguments or, if it has none of that name, to DataConfig."""
    arguments: dict[str, Any] = {
        "seed": 0,
        "global_batch": 12,
        "rank": 0,
        "world_size": 1,
        "image_size": 16,
        "teacher_size": 16,
        "num_units": 4,
        "context_length": 16,
        "say": lambda text: None,
    }
    own = {
        name: changes.pop(name)
        for name in [
            *arguments,
            "draws_twice",
            "hidden_share",
            "teacher_contains",
            "once",
            "index_dir",
            "resumes",
            "on_progress",
        ]
        if name in changes
    }
    config = DataConfig(train=str(train), **{"workers": 0, "open_shards": 3, "shuffle_window": 40} | changes)
    return TrainingData(config, **arguments | own)


class Made(NamedTuple):
    """One image's crops, as a ViewMaker made them."""

    views: np.ndarray
    """[V, 3, S, S] uint8"""
    teacher: np.ndarray | None
    """[3, s, s] uint8"""
    boxes: np.ndarray
    """[V + 1, 4]"""
    damaged: str


def make_views(
    content: bytes,
    random: np.random.Generator,
    views: Sequence[View],
    size: int,
    teacher_size: int | None,
    **options: Any,
) -> Made:
    """The crops of one encoded image, in memory of their own. options: as ViewMaker.make takes them."""
    sides = [size] * len(views) + ([teacher_size] if teacher_size else [])
    crops = [planes(torch.empty(1, side, side, 3, dtype=torch.uint8)) for side in sides]
    made = ViewMaker().make(content, random, views, crops, **options)
    teacher = crops[-1][0].numpy() if teacher_size else None
    return Made(torch.cat(crops[: len(views)]).numpy(), teacher, made.boxes, made.damaged)
