"""What every recipe's samples are, bit for bit: crops, boxes, photometric parameters, noise, tokens.

The hashes were made by commit 266e33d, before views became a list, those of LATER by 0a1c2a4, before crops were resized
into the chunk; `python -m tests.unit.data.test_recipe_views` prints those of the present code.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclip_ds import config as settings
from amclip_ds.data.batch import Batch
from amclip_ds.data.loader import TrainingData
from amclip_ds.method import method_of
from tests.unit.data.shards import encode, write_tar

HASHES = Path(__file__).with_name("recipe_views.json")
METHODS = ("clip", "flip", "random2x", "aclip", "aclip-eff")
AS_THEY_WERE = {  # the two recipes that became what was published, with the views that they had before
    "clip": ["data.photometric=true"],
    "flip": ["data.photometric=true", "data.views=[]", "data.num_views=1"],
}
LATER = ["slip paper", "siglip paper", "aclip paper data.keep_colours=true", "aclip paper turned"]
CELLS = [f"{method} {compat}" for method in METHODS for compat in ("paper", "release")] + LATER


def write_pictures(folder: Path, turned: bool = False) -> Path:
    """A shard of 24 pictures of several shapes, as PNG, whose pixels no decoder changes. turned: by their EXIF."""
    members, exif = {}, Image.Exif()
    for number in range(24):
        random = np.random.default_rng(number)
        cells = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        pixels = cells.repeat(9 + number, 0).repeat(11 + number % 5, 1) ^ random.integers(0, 16, 1, dtype=np.uint8)
        exif[0x0112] = 1 + number % 8
        options = {"exif": exif} if turned else {}
        members[f"{number:04d}.png"] = encode(Image.fromarray(pixels), "PNG", **options)
        members[f"{number:04d}.txt"] = f"a picture, number {number}\nthe picture of row {number}".encode()
    return write_tar(folder / ("turned.tar" if turned else "pictures.tar"), members)


def batch_of(cell: str, folder: Path) -> Batch:
    method, compat, *words = cell.split()
    shard = folder / ("turned.tar" if "turned" in words else "pictures.tar")
    own = [word for word in words if "=" in word] + AS_THEY_WERE.get(method, [])
    config = settings.load(f"{method}-tiny", [f"compat={compat}", "data.workers=0", f"data.train={shard}", *own])
    chosen, vision = method_of(config), config.model.vision
    teacher_size = vision.image_size // (2 if config.teacher.resolution == "half" else 1)
    data = TrainingData(
        config.data,
        seed=7,
        global_batch=12,
        rank=0,
        world_size=1,
        image_size=vision.image_size,
        teacher_size=teacher_size if chosen.needs_teacher else None,
        num_units=chosen.draws,
        teacher_contains=chosen.compat.teacher_sees_views,
        context_length=config.model.text.context_length,
        say=lambda text: None,
    )
    batches = data.batches(None)
    next(batches)
    return next(batches)


def hashes_of(batch: Batch) -> dict[str, str]:
    teacher = batch.teacher_uint8
    arrays = {
        "views": batch.views_uint8.numpy(),
        "teacher": np.zeros(0) if teacher is None else teacher.numpy(),
        "boxes": batch.boxes.numpy(),
        "photometric": batch.photometric.table,
        "noise": batch.mask_noise.numpy(),
        "tokens": batch.token_ids.numpy(),
        "samples": batch.sample_ids.numpy(),
    }
    return {
        name: f"{list(array.shape)} {hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:24]}"
        for name, array in arrays.items()
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    write_pictures(folder, turned=True)
    return folder


@pytest.mark.parametrize("cell", CELLS)
def test_a_recipe_s_samples_are_what_they_were(cell: str, pictures: Path) -> None:
    assert hashes_of(batch_of(cell, pictures)) == json.loads(HASHES.read_text())[cell]


def test_a_pixel_that_differs_is_seen(pictures: Path) -> None:
    batch = batch_of("slip paper", pictures)
    batch.views_uint8[1, 3, 0, 5, 5] ^= 1
    differing = hashes_of(batch).items() ^ json.loads(HASHES.read_text())["slip paper"].items()
    assert {name for name, _ in differing} == {"views"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for turned in (False, True):
            write_pictures(Path(folder), turned)
        print(json.dumps({cell: hashes_of(batch_of(cell, Path(folder))) for cell in CELLS}, indent=1))
