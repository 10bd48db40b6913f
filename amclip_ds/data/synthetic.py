"""Synthetic scenes: one coloured, captioned object in grey clutter; for the demo, the tests and benchmarks.

8 shapes x 8 colours = 64 classes. A scene is a function of (seed, split, number), so its bytes depend neither on the
number of processes nor on how many scenes are made.

    OUT/train/00000.tar ...           key.jpg  key.txt  key.json  key.cls
    OUT/test/0.tar ...  nshards.txt   the same members, classes balanced; CLIP_benchmark's layout, with
    OUT/classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt
    OUT/scenes.json                   what was asked for
"""

import functools
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from amclip_ds.errors import UserError
from amclip_ds.files import not_written
from amclip_ds.keyed_random import keyed
from amclip_ds.processes import WorkerCrashed, map_in_processes, num_cores
from amclip_ds.progress import progress

SHAPES = ("circle", "square", "triangle", "bar", "star", "cross", "ring", "pillar")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 215),
    "yellow": (235, 215, 40),
    "purple": (130, 50, 180),
    "orange": (245, 135, 20),
    "cyan": (40, 200, 215),
    "pink": (245, 120, 190),
}
CLASSES = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)  # the label is the place in this list
TEMPLATES = (
    "a photo of one {c}",
    "there is one {c} here",
    "the {c} among other things",
    "a textured picture with the {c}",
    "one {c} in a cluttered scene",
)
PHRASINGS = tuple(text.replace("{c}", "{colour} {shape}") for text in TEMPLATES) + ("a {shape} that is {colour}",)
OBJECT_SIDE, SMALL_SIDE = (0.28, 0.42), (0.15, 0.25)  # of the image's shorter side
DISTRACTORS = (2, 4)
NOISE = ((4, 20), (8, 16), (16, 10))  # (cells along a side, amplitude in grey levels), from coarse to fine
FINE_NOISE = 6
SMOOTH = 4  # an object is drawn this many times too large and then reduced
JPEG_QUALITY = 95  # of 64 pixels with full colour resolution: the 8 x 8 blocks do not show
SMALLEST_SIDE = 16
SCENES_PER_PROCESS = 2000  # fewer are not worth starting a process for
FORMAT = 1  # in scenes.json; other drawings are another format


@dataclass(frozen=True)
class SceneConfig:
    """What a data set of scenes is made from."""

    image_size: int = 64
    """Side in pixels."""
    seed: int = 0
    """Another seed gives other scenes, in both splits."""
    coloured_distractors: bool = False
    """Colour the clutter too, so that the object is no longer the only saturated thing (a control)."""

    small_objects: bool = False
    """Objects of 0.15 to 0.25 of the image's side, for 0.28 to 0.42."""

    def __post_init__(self) -> None:
        if self.image_size < SMALLEST_SIDE:
            raise UserError(f"--image-size: {self.image_size} is below {SMALLEST_SIDE}")


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it."""

    image: Image.Image
    label: int
    """place in CLASSES"""
    box: tuple[int, int, int, int]
    """top, left, height, width of the object in pixels: the smallest box around it"""
    captions: tuple[str, ...]
    """every phrasing"""
    caption: str
    """the one that is in the .txt"""


def write_dataset(
    folder: Path,
    num_train: int,
    num_test: int,
    image_size: int = 64,
    seed: int = 0,
    *,
    coloured_distractors: bool = False,
    small_objects: bool = False,
    shard_size: int = 1000,
    workers: int | None = None,
) -> bool:
    """Writes both splits; the folder appears whole, by one rename. Shows its progress.

    Returns False, and writes nothing, where the same data set exists already.
    Raises UserError for a folder that holds something else or cannot be written.
    """
    config = SceneConfig(image_size, seed, coloured_distractors, small_objects)
    if num_train < 0 or num_test < 0 or shard_size < 1:
        raise UserError(f"--train {num_train}, --test {num_test}, --shard-size {shard_size}: too few")
    asked = {"format": FORMAT, "num_train": num_train, "num_test": num_test, "shard_size": shard_size, **asdict(config)}
    if not small_objects:
        del asked["small_objects"]  # sets from before it was a choice are these
    if _is_made(folder, asked):
        return False
    with _appearing_whole(folder) as partial:
        jobs = [*_shards(partial, "train", num_train, shard_size), *_shards(partial, "test", num_test, shard_size)]
        processes = min(workers or num_cores(), (num_train + num_test) // SCENES_PER_PROCESS)
        with progress("making scenes", num_train + num_test) as advance:
            for written in map_in_processes(functools.partial(write_shard, config), jobs, processes):
                if isinstance(written, WorkerCrashed):
                    raise UserError(f"--out {folder}: {written}")
                advance(written)
        _write_benchmark_files(partial, num_shards=sum(split == "test" for _, split, _ in jobs))
        (partial / "scenes.json").write_text(json.dumps(asked) + "\n")
    return True


def write_shard(config: SceneConfig, job: tuple[Path, str, range]) -> int:
    """Writes the scenes of (path, split, numbers) as one tar. Returns how many."""
    from webdataset import TarWriter

    path, split, numbers = job
    with path.open("wb") as file, TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
        for number in numbers:
            for suffix, content in members_of(make_scene(config, split, number)):  # one by one: it sorts members
                tar.write({"__key__": f"{number:09d}", suffix: content})
    return len(numbers)


def make_scene(config: SceneConfig, split: str, number: int) -> Scene:
    """Scene `number` of a split: in "test" its class goes round, elsewhere it is drawn."""
    random = keyed(config.seed, "scene", split, number)
    label = number % len(CLASSES) if split == "test" else int(random.integers(len(CLASSES)))
    shape, colour = CLASSES[label]
    image = draw_background(random, config.image_size, config.image_size)
    draw_distractors(random, image, config.coloured_distractors)
    box = draw_object(random, image, shape, colour, SMALL_SIDE if config.small_objects else OBJECT_SIDE)
    captions = tuple(phrasing.format(shape=shape, colour=colour) for phrasing in PHRASINGS)
    return Scene(image, label, box, captions, captions[int(random.integers(len(captions)))])


def members_of(scene: Scene) -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of the members of one sample."""
    picture = io.BytesIO()
    scene.image.save(picture, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    shape, colour = CLASSES[scene.label]
    fields = {"shape": shape, "colour": colour, "box": scene.box, "captions": scene.captions}
    yield "jpg", picture.getvalue()
    yield "txt", scene.caption.encode()
    yield "json", json.dumps(fields).encode()
    yield "cls", str(scene.label).encode()


def class_name(label: int) -> str:
    """The words for a class: "red circle"."""
    shape, colour = CLASSES[label]
    return f"{colour} {shape}"


def draw_background(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A muted gradient between two colours, under noise of several scales."""
    ends = random.uniform(70, 180, size=(2, 1)) + random.uniform(-18, 18, size=(2, 3))  # grey, slightly tinted
    angle = random.uniform(0, 2 * math.pi)
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32) * np.float32(math.cos(angle))
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32) * np.float32(math.sin(angle))
    grey = np.zeros((height, width), dtype=np.float32)
    for cells, amplitude in NOISE:
        coarse = Image.fromarray(random.standard_normal((cells, cells), dtype=np.float32))
        grey += amplitude * np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    grey += FINE_NOISE * random.standard_normal((height, width), dtype=np.float32)
    mix = across[None, :] + down[:, None] + np.float32(0.5)
    first, second = ends.astype(np.float32)
    pixels = first + mix[..., None] * (second - first) + grey[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_distractors(random: np.random.Generator, image: Image.Image, coloured: bool) -> None:
    """A few translucent ellipses, grey or of any hue, partly outside perhaps."""
    pen = ImageDraw.Draw(image, "RGBA")
    side = min(image.size)
    for _ in range(int(random.integers(DISTRACTORS[0], DISTRACTORS[1] + 1))):
        x, y = random.uniform(0, image.width), random.uniform(0, image.height)
        half_width, half_height = random.uniform(0.06, 0.22, size=2) * side
        grey, opacity = int(random.integers(30, 226)), int(random.integers(90, 190))
        turns = random.random(3)
        fill = tuple(int(255 * part) for part in turns) if coloured else (grey, grey, grey)
        pen.ellipse((x - half_width, y - half_height, x + half_width, y + half_height), fill=(*fill, opacity))


def draw_object(
    random: np.random.Generator, image: Image.Image, shape: str, colour: str, sides: tuple[float, float] = OBJECT_SIDE
) -> tuple[int, int, int, int]:
    """Draws one object somewhere inside. Returns its box: top, left, height, width in pixels. sides: parts of the
    image's shorter side."""
    side = round(random.uniform(*sides) * min(image.size))
    left, top = int(random.integers(image.width - side + 1)), int(random.integers(image.height - side + 1))
    shade = random.uniform(0.85, 1.1)
    fill = tuple(min(255, int(part * shade)) for part in COLOURS[colour])
    stencil = draw_stencil(shape, side)
    image.paste(fill, (left, top), stencil)
    x0, y0, x1, y1 = stencil.getbbox() or (0, 0, side, side)
    return top + y0, left + x0, y1 - y0, x1 - x0


@functools.lru_cache(maxsize=1024)
def draw_stencil(shape: str, side: int) -> Image.Image:
    """A shape that fills a square of `side` pixels, as an opacity with smooth edges."""
    large = side * SMOOTH
    stencil = Image.new("L", (large, large))
    pen = ImageDraw.Draw(stencil)
    near, far = 0.36 * large, 0.64 * large
    match shape:
        case "circle":
            pen.ellipse((0, 0, large - 1, large - 1), fill=255)
        case "square":
            pen.rectangle((0.08 * large, 0.08 * large, 0.92 * large - 1, 0.92 * large - 1), fill=255)
        case "triangle":
            pen.polygon([(large / 2, 0), (large - 1, 0.93 * large), (0, 0.93 * large)], fill=255)
        case "bar":
            pen.rectangle((0, near, large - 1, far - 1), fill=255)
        case "star":
            pen.polygon(_star(large), fill=255)
        case "cross":
            pen.rectangle((0, near, large - 1, far - 1), fill=255)
            pen.rectangle((near, 0, far - 1, large - 1), fill=255)
        case "ring":
            pen.ellipse((0, 0, large - 1, large - 1), fill=255)
            pen.ellipse((0.26 * large, 0.26 * large, 0.74 * large, 0.74 * large), fill=0)
        case "pillar":
            pen.rectangle((near, 0, far - 1, large - 1), fill=255)
        case _:
            raise ValueError(f"no such shape: {shape}")
    return stencil.reduce(SMOOTH)


def _star(side: int) -> list[tuple[float, float]]:
    """A five-pointed star: ten corners, from the top clockwise."""
    corners = []
    for corner in range(10):
        radius, turn = (0.5 if corner % 2 == 0 else 0.21) * side, math.pi * corner / 5
        corners.append((side / 2 + radius * math.sin(turn), 0.53 * side - radius * math.cos(turn)))
    return corners


def _shards(folder: Path, split: str, count: int, shard_size: int) -> Iterator[tuple[Path, str, range]]:
    """(path, split, numbers) of each shard; the test split has one even if empty, as its layout asks."""
    (folder / split).mkdir()
    for number, start in enumerate(range(0, max(count, split == "test"), shard_size)):
        name = f"{number}.tar" if split == "test" else f"{number:05d}.tar"
        yield folder / split / name, split, range(start, min(count, start + shard_size))


def _write_benchmark_files(folder: Path, num_shards: int) -> None:
    """What CLIP_benchmark reads beside the tars."""
    (folder / "test" / "nshards.txt").write_text(f"{num_shards}\n")
    (folder / "classnames.txt").write_text("".join(f"{class_name(label)}\n" for label in range(len(CLASSES))))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{text}\n" for text in TEMPLATES))
    (folder / "dataset_type.txt").write_text("classification\n")


def _is_made(folder: Path, asked: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / "scenes.json").read_text()) == asked
    except (OSError, json.JSONDecodeError):
        return False


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all is written; nothing is left behind by an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: holds something else; name an empty or new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise not_written(f"--out {folder}:", error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
