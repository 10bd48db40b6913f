"""Image folders and lists of images: which images there are, and what each is said to show.

    ROOT/tench/1.jpg                      a folder a class
    ROOT/val/n01440764/1.JPEG             splits of such folders; train, val, test are never classes
    ROOT/1.jpg  ROOT/labels.csv           images beside one file of lines NAME,LABEL (or NAME LABEL), for every image
    LIST.txt  LIST.csv                    such a file, its names relative to its folder

A layout that could be understood in two ways, or in none, is a UserError that says which.
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amclip_ds.errors import UserError
from amclip_ds.files import is_regular, read_text

SPLITS = ("test", "val", "validation", "valid", "dev", "train", "training")  # without a wish, the first there is
TRAINING = ("train", "training")
READ = ("webp", "png", "jpg", "jpeg", "jpe", "jfif")
SUFFIXES = (*READ, "bmp", "ppm", "pgm", "gif", "tif", "tiff", "avif", "heic", "jxl", "jp2")  # none is passed over
LISTS = (".txt", ".csv", ".tsv")
WNID = re.compile(r"n\d{8}", re.ASCII)
MAX_LIST = 256 << 20  # bytes of a list of images
SEARCHED = 20_000  # entries checked to find an image below a folder


@dataclass
class Found:
    """Images and the words that say what each shows: its folder's name, or its label in a list."""

    root: Path
    images: list[Path]
    labels: list[str]
    note: str = ""
    """what was understood beyond that, for people"""


def check_inside(path: Path, folder: Path) -> None:
    """Refuses a file of a set that links to elsewhere, whose text would be printed as names and labels.

    A view of a Hugging Face cache (`snapshots`) may link into that cache (`blobs`). Raises UserError.
    """
    target, home = path.resolve(), folder.resolve()
    is_of_cache = any(at.name == "snapshots" and target.parent == at.parent / "blobs" for at in home.parents)
    if home not in target.parents and not is_of_cache:
        raise UserError(f"{path}: a link that leads out of {folder}")


def choose_split(folder: Path, wanted: str, holding: Sequence[str]) -> str:
    """The split to take of those that hold something; "" where there are no splits. Raises UserError.

    wanted: what was asked for by name; "": the first of test, val, ... and never the training split.
    """
    there = [name for name in holding if name.lower() in SPLITS]
    if wanted:
        if wanted not in holding:
            raise UserError(f"{folder}: has no split {wanted!r}{f', but {_listed(there)}' if there else ''}")
        return wanted
    usual = [name for split in SPLITS if split not in TRAINING for name in there if name.lower() == split]
    if there and not usual:
        raise UserError(f"{folder}: holds the training split {there[0]!r} alone; name {folder / there[0]} to take it")
    return usual[0] if usual else ""


def find(folder: Path, split: str = "", is_named: bool = False) -> Found | None:
    """The images below a folder; None where it holds none, or tars. Raises UserError for what is not understood.

    is_named: class names were given, so that a folder called `train` beside others may be a class.
    """
    below = [path for path in _folders(folder) if _has_image(path)]
    splits = [path.name for path in below if path.name.lower() in SPLITS]
    others = [path.name for path in below if path.name not in splits]
    if split in splits:
        return _in_split(folder, split)
    if splits and others and not is_named:
        raise UserError(
            f"{folder}: {_listed(splits)} may be a split or a class beside {_listed(others)}: name the folder of the"
            f" classes, such as {folder / splits[0]}; where it is a class, a file of class names has to say so"
        )
    chosen = choose_split(folder, split, splits if not others else [])
    return _in_split(folder, chosen) if chosen else _classes(folder, below)


def _in_split(folder: Path, split: str) -> Found:
    root = folder / split
    found = _classes(root, [path for path in _folders(root) if _has_image(path)], folder)
    assert found is not None  # it holds an image
    found.note = f"split {split}" + (f", {found.note}" if found.note else "")
    return found


def _classes(root: Path, below: list[Path], above: Path | None = None) -> Found | None:
    """A folder a class; or images beside a list of their labels, which may be in the folder `above` too."""
    loose = _images(root)
    if not below or (len(below) == 1 and not loose and _label_files(root, above, below[0])):
        return _labelled(root, above, below[0] if below else root)
    if len(below) == 1 and not _images(below[0]):
        raise UserError(f"{root}: holds {below[0].name!r} alone; name the folder that holds the classes")
    images, labels = [], []
    for path in _folders(root):
        direct = _images(path)
        if not direct and path in below:
            raise UserError(
                f"{root}: {path.name!r} holds folders, not images: name the folder that holds a folder a class"
            )
        if not direct:
            raise UserError(f"{path}: a class without images")
        every = sorted(image for folder in _folders_below(path) for image in _images(folder))
        images += every
        labels += [path.name] * len(every)
    return Found(root, images, labels, f"{len(loose)} images outside of classes are left out" if loose else "")


def _labelled(root: Path, above: Path | None, base: Path) -> Found | None:
    """Images that are beside a file with their labels."""
    images = _images(base)
    if not images:
        return None
    files = _label_files(root, above, base)
    if not files:
        raise UserError(
            f"{base}: {len(images)} images without labels: put them into a folder a class, or a file labels.csv beside"
            " them with a line NAME,LABEL for each"
        )
    if len(files) > 1:
        raise UserError(f"{root}: {_listed([file.name for file in files])} may each hold the labels: leave one there")
    labels = dict(_rows(files[0], base))
    missing = [image for image in images if image not in labels]
    if missing:
        raise UserError(f"{files[0]}: no label for {len(missing)} of {len(images)} images, the first {missing[0].name}")
    return Found(root, images, [labels[image] for image in images], f"labels of {files[0].name}")


def _label_files(root: Path, above: Path | None, base: Path) -> list[Path]:
    """The lists whose first lines name images of `base`."""
    found = []
    for folder in [root, *([above] if above else [])]:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in LISTS and not path.name.startswith(".") and is_regular(path):
                rows = _table(path)[:2]
                check_inside(path, folder)
                if any(row and image_named(base, row[0]) for _, row in rows):
                    found.append(path)
    return found


def is_list(path: Path) -> bool:
    """Whether a file is a list of images, not of shards."""
    if path.suffix.lower() not in LISTS or not is_regular(path):
        return False
    return any(len(row) > 1 and image_named(path.parent, row[0]) for _, row in _table(path)[:2])


def read_list(path: Path) -> Found:
    """The images that a list names, with their labels. Raises UserError that names the line."""
    rows = _rows(path, path.parent)
    if not rows:
        raise UserError(f"{path}: names no image; it holds a line NAME,LABEL for each")
    return Found(path, [image for image, _ in rows], [label for _, label in rows])


def _rows(path: Path, base: Path) -> list[tuple[Path, str]]:
    """(image, label) of every line; a first line that names no image is a heading."""
    rows, seen = [], set()
    for place, (line, row) in enumerate(_table(path)):
        image = image_named(base, row[0])
        if image is None and place == 0:
            continue
        if image is None:
            raise UserError(f"{path}: line {line} names {row[0][:80]!r}, and {base} holds no such image")
        if image in seen:
            raise UserError(f"{path}: line {line} names {row[0][:80]!r} a second time")
        seen.add(image)
        rows.append((image, _label(path, line, row)))
    return rows


def _label(path: Path, line: int, row: list[str]) -> str:
    """The second column; of more columns, only where that one is a wnid, as in the lists of ImageNet's kin."""
    words = row[1].split() if len(row) > 1 else []
    if words and WNID.fullmatch(words[0]):
        return words[0]
    if len(row) != 2 or not words:
        raise UserError(f"{path}: line {line} is not NAME,LABEL")
    return row[1]


def _table(path: Path) -> list[tuple[int, list[str]]]:
    """(number, columns) of the lines that are not blank: by commas (.csv), by tabs, or else by the last space."""
    lines = [(n, text) for n, text in enumerate(read_text(path, MAX_LIST).removeprefix("\ufeff").split("\n"), 1)]
    lines = [(number, text.strip()) for number, text in lines if text.strip()]
    if path.suffix.lower() == ".csv":
        try:
            return [(number, [cell.strip() for cell in next(csv.reader([text]))]) for number, text in lines]
        except csv.Error as error:
            raise UserError(f"{path}: {error}") from None
    return [(number, text.split("\t") if "\t" in text else text.rsplit(None, 1)) for number, text in lines]


def image_named(base: Path, name: str) -> Path | None:
    """The image of that name below `base`, with or without its suffix; never outside of it."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or len(name) > 1000:
        return None
    if "." in name and name.rpartition(".")[2].lower() in SUFFIXES:
        return base / name if is_regular(base / name) else None
    return next((base / f"{name}.{end}" for end in (*READ, "JPEG") if is_regular(base / f"{name}.{end}")), None)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, by name; hidden ones are none."""
    return sorted(entry for entry in path.iterdir() if not _is_hidden(entry.name) and entry.is_dir())


def _images(path: Path) -> list[Path]:
    """The images directly in a folder, by name: whatever is called one, so that none is passed over in silence."""
    names = [entry.name for entry in os.scandir(path) if entry.name.rpartition(".")[2].lower() in SUFFIXES]
    return [path / name for name in sorted(names) if not _is_hidden(name) and not (path / name).is_dir()]


def _folders_below(path: Path) -> list[Path]:
    return [path, *(Path(at) / name for at, names, _ in os.walk(path) for name in names if not _is_hidden(name))]


def has_images(path: Path) -> bool:
    """Whether an image is directly in a folder."""
    return bool(_images(path))


def _has_image(path: Path) -> bool:
    """Whether an image is in a folder or below it."""
    waiting, searched = [path], 0
    while waiting and searched < SEARCHED:
        at = waiting.pop()
        with os.scandir(at) as entries:
            for entry in entries:
                searched += 1
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.name.rpartition(".")[2].lower() in SUFFIXES:
                    return True
    return False


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
