"""What is evaluated on: CLIP_benchmark's WebDataset layout, image folders, and tars of images with captions.

    DIR/classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt
    DIR/test/nshards.txt  0.tar ...      key.{webp,png,jpg,jpeg} with key.cls (a label) or key.txt (a caption a line)

An image folder has a folder a class, in DIR or in DIR/test. Opening a set reads the tars' headers, labels and captions,
never the images; every mistake in it is a UserError that names the file.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from amclip_ds.data import sources
from amclip_ds.data.grouping import ADVICE, MAX_IMAGE_BYTES, Group, group, left_out_name, scattered
from amclip_ds.data.images import BadImage, open_image
from amclip_ds.data.plain_text import BadText, decode, lines, parse_object, visible
from amclip_ds.data.tar import Damage, Member, printable, scan
from amclip_ds.errors import UserError
from amclip_ds.files import describe, is_regular, open_regular, read_text

CLASSIFICATION, RETRIEVAL = "zeroshot_classification", "retrieval"
IMAGES = ("webp", "png", "jpg", "jpeg")
MAX_PIXELS = 128 << 20  # a header that claims more is not decoded
MAX_TEXT = 1 << 20  # bytes of a label or a text
MAX_LINES = 16 << 20  # bytes of a list of class names or templates
OPENAI_7 = "openai-7"
"""CLIP's choice of 7 of its 80 ImageNet prompts (its notebook), which SLIP and A-CLIP report with."""


@dataclass(frozen=True)
class Sample:
    """One image, its label, or its captions."""

    path: str
    """of the tar or the image"""
    offset: int
    """of the image's bytes in it"""
    size: int
    key: str
    label: int = -1
    captions: tuple[str, ...] = ()

    plain: bool = False
    """opened as CLIP_benchmark does: neither turned upright nor laid on white"""

    @property
    def place(self) -> str:
        """Its file, and its key in it, as messages name them."""
        return printable(self.path if self.path.endswith(self.key) else f"{self.path}: {self.key}")

    def read(self) -> Image.Image:
        """The image in RGB. Raises UserError, naming file and key, for one that cannot be read."""
        try:
            with open_regular(Path(self.path)) as file:
                file.seek(self.offset)
                content = file.read(min(self.size, MAX_IMAGE_BYTES + 1))
            if len(content) > MAX_IMAGE_BYTES:
                raise BadImage("too large", f"more than {MAX_IMAGE_BYTES} bytes")
            return open_image(content, MAX_PIXELS).picture(self.plain)
        except OSError as error:
            raise UserError(f"{self.place}: {describe(error)}") from None
        except BadImage as error:
            own = f" ({error.detail})" if error.detail else ""
            raise UserError(f"{self.place} cannot be read as an image: {error}{own}") from None


@dataclass(frozen=True)
class EvalSet:
    """A data set, opened."""

    name: str
    task: str
    """zeroshot_classification | retrieval"""
    samples: tuple[Sample, ...]
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    """with `{c}` for the class name"""
    folder: str = field(default="", compare=False)

    @property
    def images(self) -> str:
        """How its images are opened, as its rows say: as CLIP_benchmark does, or upright with what is transparent on
        white, as training does."""
        return "plain" if self.samples[0].plain else "upright"

    def __len__(self) -> int:
        return len(self.samples)


@lru_cache(maxsize=8)
def open_set(
    spec: str, split: str = "test", task: str = "auto", classnames: str = "folder", templates: str = "folder"
) -> EvalSet:
    """Opens what `--data` names. Raises UserError for anything missing, empty or inconsistent.

    task: auto (what dataset_type.txt or the samples say), zeroshot_classification or retrieval.
    classnames: folder | imagenet | a file, one a line. templates: folder | openai-7 | openai-80 | a file | none.
    """
    folder = Path(spec)
    task = _task_of(folder, spec) if task == "auto" else task
    whole = folder.resolve()
    name = f"{whole.parent.name}_{whole.name}" if whole.name == split else whole.name.removesuffix(".tar")
    if folder.is_dir() and _is_image_folder(folder, split):
        if task == RETRIEVAL:
            raise UserError(f"--data {spec}: an image folder has no captions; --task zeroshot_classification")
        samples, names = _read_image_folder(_image_root(folder, split), folder)
    else:
        samples, names = _read_tars(_shards_of(folder, spec, split), task), None
        if _is_suite(folder):
            samples = tuple(replace(sample, plain=True) for sample in samples)
    if task == RETRIEVAL:
        return EvalSet(name, task, samples, folder=spec)
    chosen = _classnames(folder, names, classnames)
    _check_labels(samples, chosen, folder)
    return EvalSet(name, task, samples, chosen, () if templates == "none" else _templates(folder, templates), spec)


def _is_suite(folder: Path) -> bool:
    """Whether it has the files of CLIP_benchmark's layout."""
    return any((folder / name).is_file() for name in ("dataset_type.txt", "classnames.txt"))


def _task_of(folder: Path, spec: str) -> str:
    file = folder / "dataset_type.txt"
    if not file.is_file():
        has_names = folder.is_dir() and ((folder / "classnames.txt").is_file() or _is_image_folder(folder, "test"))
        return CLASSIFICATION if has_names else RETRIEVAL
    said = read_text(file).strip().lower()
    if said not in ("classification", "retrieval"):
        raise UserError(f"{file}: {said[:80]!r} is neither classification nor retrieval")
    return CLASSIFICATION if said == "classification" else RETRIEVAL


def _shards_of(folder: Path, spec: str, split: str) -> list[str]:
    """The tars of a split: as many as nshards.txt says, or, without it, every tar there is."""
    root = folder / split
    if not root.is_dir():
        if (folder / "dataset_type.txt").is_file():
            raise UserError(f"--data {spec}: has no split {split!r}")
        return sources.expand_local(spec, "--data")
    counted = root / "nshards.txt"
    if not counted.is_file():
        if (folder / "dataset_type.txt").is_file() and split == "test":
            raise UserError(f"{counted}: missing; it holds the number of tars in {root}")
        return sources.expand_local(str(root), "--data")
    text = read_text(counted, 1000).strip()
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise UserError(f"{counted}: {text[:40]!r} is not a number of tars")
    shards = []
    for number in range(int(text)):
        shards.append(str(root / f"{number}.tar"))
        if not is_regular(root / f"{number}.tar"):  # at the first: the number is only what somebody wrote down
            raise UserError(f"{shards[-1]}: missing; {counted} says {text}")
    return shards


def _read_tars(shards: Sequence[str], task: str) -> tuple[Sample, ...]:
    samples = [sample for shard in shards for sample in _read_tar(shard, task)]
    if not samples:
        raise UserError(f"{shards[0]}: no image with a {'label (.cls)' if task == CLASSIFICATION else 'text'} in it")
    return tuple(samples)


def _read_tar(shard: str, task: str) -> list[Sample]:
    """The samples of one tar, in order. Raises UserError if it is empty or damaged, if a sample lacks its part, and for
    an image that is in no sample."""
    path, groups = Path(shard), []
    with path.open("rb") as file:
        for item in group(scan(file, path.stat().st_size)):
            if isinstance(item, Damage):
                raise UserError(f"{shard}: damaged at byte {item.offset}: {item.cause}")
            if isinstance(item, Group):
                groups.append(item)
            elif kind := left_out_name(item):
                raise UserError(f"{shard}: {printable(item.name)}: {ADVICE[kind]}")
        if not groups:
            raise UserError(f"{shard}: an empty tar")
        for key in sorted(scattered(groups))[:1]:
            raise UserError(f"{shard}: {printable(key)}: {ADVICE['not adjacent']}")
        return [_sample(file, shard, one, task) for one in groups]


def _sample(file: io.BufferedReader, shard: str, one: Group, task: str) -> Sample:
    key, images = printable(one.key.lstrip("/")), [image for _, image in one.images()]
    if not images:
        raise UserError(f"{shard}: {key} has no image ({', '.join(IMAGES)})")
    if len(images) > 1:
        raise UserError(f"{shard}: {key} has {len(images)} images, {images[1].name} too; {ADVICE['surplus image']}")
    if any(member.is_sparse for member in one.members.values()):
        raise UserError(f"{shard}: {key}: {ADVICE['sparse']}")
    place = images[0].offset, images[0].size
    if task == RETRIEVAL:
        captions = tuple(_captions(file, shard, key, one))
        if not captions:
            raise UserError(f"{shard}: {key} has no caption (.txt, or .json with `captions`)")
        return Sample(shard, *place, key, captions=captions)
    label = one.member("cls")
    if label is None:
        raise UserError(f"{shard}: {key} has no label (.cls)")
    text = _text(shard, key, _content(file, shard, key, label)).strip()
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{shard}: {key}.cls holds {text[:40]!r}, not a label")
    return Sample(shard, *place, key, label=int(text))


def _captions(file: io.BufferedReader, shard: str, key: str, one: Group) -> list[str]:
    """Every line of the .txt (CLIP_benchmark's way); without one, the json's `captions` or `caption`."""
    if text := one.member("txt"):
        return visible(lines(_text(shard, key, _content(file, shard, key, text))))
    if (member := one.member("json")) is None:
        return []
    try:
        fields = parse_object(_content(file, shard, key, member))
    except BadText as error:
        raise UserError(f"{shard}: {key}.json cannot be read: {error}") from None
    found = fields.get("captions", fields.get("caption", []))
    return visible([text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)])


def _text(shard: str, key: str, content: bytes) -> str:
    try:
        return decode(content)
    except BadText:
        raise UserError(f"{shard}: {key} has a text that is not UTF-8") from None


def _content(file: io.BufferedReader, shard: str, key: str, member: Member) -> bytes:
    if member.size > MAX_TEXT:
        raise UserError(f"{shard}: {key} has a text of {member.size} bytes")
    file.seek(member.offset)
    return file.read(member.size)


def _image_root(folder: Path, split: str) -> Path:
    return folder / split if (folder / split).is_dir() else folder


def _is_image_folder(folder: Path, split: str) -> bool:
    """Whether there is a folder with an image in it, and no tar beside it."""
    root = _image_root(folder, split)
    if any(root.glob("*.tar")) or (root / "nshards.txt").exists():
        return False
    return any(_images_in(path) for path in root.iterdir() if path.is_dir())


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in (*IMAGES, "bmp", "ppm"))


def _read_image_folder(root: Path, folder: Path) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Classes are the folders in the order of their names, as torchvision numbers them."""
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    samples = []
    for label, path in enumerate(classes):
        images = _images_in(path)
        if not images:
            raise UserError(f"{path}: a class without images")
        for image in images:
            key = str(image.relative_to(root))
            samples.append(Sample(str(image), 0, image.stat().st_size, key, label=label))
    return tuple(samples), tuple(path.name for path in classes)


def _classnames(folder: Path, found: tuple[str, ...] | None, choice: str) -> tuple[str, ...]:
    if choice == "imagenet" or (choice == "folder" and _are_imagenet_ids(found)):
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    file = folder / "classnames.txt" if choice == "folder" else Path(choice)
    if choice == "folder" and found is not None and not file.is_file():
        return tuple(name.replace("_", " ") for name in found)
    return _lines(file, "one class name a line, in the order of the labels")


def _are_imagenet_ids(found: tuple[str, ...] | None) -> bool:
    return found is not None and len(found) == 1000 and all(name[:1] == "n" and name[1:].isdigit() for name in found)


def _templates(folder: Path, choice: str) -> tuple[str, ...]:
    if choice in (OPENAI_7, "openai-80"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        functions = SIMPLE_IMAGENET_TEMPLATES if choice == OPENAI_7 else OPENAI_IMAGENET_TEMPLATES
        return tuple(function("{c}") for function in functions)
    file = folder / "zeroshot_classification_templates.txt" if choice == "folder" else Path(choice)
    if choice == "folder" and not file.is_file():
        raise UserError(f"{file}: missing; write one prompt a line with {{c}} in it, or --templates {OPENAI_7}")
    templates = _lines(file, "one prompt a line, with {c} for the class name")
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"{file}: {template[:60]!r} has no {{c}} for the class name")
    return templates


def _lines(file: Path, holds: str) -> tuple[str, ...]:
    if not file.is_file():
        raise UserError(f"{file}: missing; it holds {holds}")
    lines = tuple(line.strip() for line in read_text(file, MAX_LINES).splitlines() if line.strip())
    if not lines:
        raise UserError(f"{file}: empty; it holds {holds}")
    return lines


def _check_labels(samples: Sequence[Sample], classnames: tuple[str, ...], folder: Path) -> None:
    largest = max(samples, key=lambda sample: sample.label)
    if largest.label >= len(classnames):
        raise UserError(
            f"{largest.path}: {largest.key} has label {largest.label}, and there are {len(classnames)} class names"
        )
    distinct = len({sample.label for sample in samples})
    if distinct > len(classnames):
        raise UserError(f"{folder}: {distinct} labels and {len(classnames)} class names")
