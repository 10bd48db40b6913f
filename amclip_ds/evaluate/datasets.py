"""What is evaluated on: CLIP_benchmark's WebDataset layout, image folders, and tars of images with captions.

    DIR/classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt
    DIR/test/nshards.txt  0.tar ...      key.{webp,png,jpg,jpeg} with key.cls (a label) or key.txt (a caption a line)

folders.py has the other layouts, a folder a class, with or without splits, and lists; winogavil.py has games. Opening
a set reads the tars' headers, labels and captions, never the images; every mistake in it is a UserError that names the
file. A layout that is not understood is refused, never guessed, and EvalSet.describe says what was understood.
"""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from amclip_ds.data.plain_text import BadText, decode, lines, parse_object, visible
from amclip_ds.errors import UserError
from amclip_ds.evaluate import folders, names, winogavil
from amclip_ds.evaluate.set_names import GROUPED, known_name
from amclip_ds.files import is_regular, not_read, open_regular, read_text
from amclip_ds.images import BadImage, open_image
from amclip_ds.shards import sources
from amclip_ds.shards.grouping import ADVICE, MAX_IMAGE_BYTES, Group, group, left_out_name, scattered
from amclip_ds.shards.tar import Damage, Member, printable, scan

CLASSIFICATION, RETRIEVAL, ASSOCIATION = "zeroshot_classification", "retrieval", "association"
MULTILABEL = "multilabel"  # of dataset_type.txt: a classification of several labels an image
IMAGES = ("webp", "png", "jpg", "jpeg")
MAX_PIXELS = 128 << 20  # a header that claims more is not decoded
MAX_TEXT = 1 << 20  # bytes of a label or a text


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

    numbers: tuple[int, ...] = ()
    """of its .npy: 0 or 1 for each class of a set with several labels an image, or the groups it belongs to"""

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
            raise not_read(self.place, error) from None
        except BadImage as error:
            own = f" ({error.detail})" if error.detail else ""
            raise UserError(f"{self.place} cannot be read as an image: {error}{own}") from None


@dataclass(frozen=True)
class EvalSet:
    """A data set, opened."""

    name: str
    task: str
    """zeroshot_classification | retrieval | association"""
    samples: tuple[Sample, ...]
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    """with `{c}` for the class name"""
    folder: str = field(default="", compare=False)
    is_multilabel: bool = False
    """whether an image may have several labels, which are in its `numbers`"""
    note: str = field(default="", compare=False)
    """which prompts, and what else was understood"""
    asked: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    """(`templates`, `classnames` or `split`, the option's value) where these are others than the set's own"""
    games: tuple[winogavil.Game, ...] = ()
    """of association: cues and which of the samples are chosen for them"""

    @property
    def images(self) -> str:
        """How its images are opened, as its rows say: as CLIP_benchmark does, or upright with what is transparent on
        white, as training does."""
        return "plain" if self.samples[0].plain else "upright"

    @property
    def groups(self) -> np.ndarray | None:
        """[N, K] the groups that its images belong to, where a metric goes by them."""
        has_groups = not self.is_multilabel and bool(self.samples[0].numbers)
        return np.array([sample.numbers for sample in self.samples]) if has_groups else None

    def describe(self) -> str:
        """What was understood, in a line."""
        opened = f"images opened {'as CLIP_benchmark does' if self.images == 'plain' else 'upright'}"
        if self.task == RETRIEVAL:
            captions = sum(len(sample.captions) for sample in self.samples)
            parts = [f"{len(self)} images, {captions} captions", opened]
        elif self.task == ASSOCIATION:
            parts = [f"WinoGAViL, {len(self.games)} cues, {len(self)} images", opened]
        else:
            labels = {sample.label for sample in self.samples}
            if self.is_multilabel:
                labels = {place for sample in self.samples for place, there in enumerate(sample.numbers) if there}
            occur = len(labels)
            some = f" ({occur} of them occur)" if occur < len(self.classnames) else ""
            names = [printable(name) for name in self.classnames[:3]] + ["..."] * (len(self.classnames) > 3)
            parts = [
                f"{len(self.classnames)} classes{some}: {', '.join(names)}",
                f"{len(self)} images",
                self.note,
                opened,
            ]
        return f"{printable(self.folder)}: {'; '.join(part for part in parts if part)}"

    def __len__(self) -> int:
        return len(self.samples)


@lru_cache(maxsize=8)
def open_set(
    spec: str,
    split: str = "",
    task: str = "auto",
    classnames: str = "folder",
    templates: str = "folder",
    key: str = "--data",
) -> EvalSet:
    """Opens a data set. Raises UserError that begins with `key` for what is missing, empty, inconsistent or unclear.

    split: "": test, or else what the folder has beside the training split.
    task: auto (what dataset_type.txt or the samples say), zeroshot_classification, retrieval or association.
    classnames: folder | imagenet | a file, one a line. templates: folder | openai-7 | openai-80 | a file | none.
    key: what the user named it by; only `--data` of `amclip eval` has those other options beside it.
    """
    try:
        return _open_set(spec, split, task, classnames, templates, key)
    except UserError as error:
        is_of_another = str(error).startswith(("--classnames: ", "--templates: "))
        raise error if is_of_another else type(error)(f"{key}: {str(error).removeprefix(f'{key}: ')}") from None
    except OSError as error:  # a folder that may not be read
        raise not_read(f"{key}: {printable(spec)}", error) from None
    except ValueError as error:  # a name that no file system takes
        raise UserError(f"{key}: {printable(spec)}: {error}") from None


def open_sets(specs: Sequence[str], key: str) -> list[EvalSet]:
    """Opens several whose rows can be distinguished. Raises UserError."""
    found = [open_set(spec, key=key) for spec in dict.fromkeys(specs)]
    check_distinct(found, key)
    return found


def check_distinct(sets: Sequence[EvalSet], key: str) -> None:
    """Refuses two folders of one name, since a row of eval.jsonl has the name alone. Raises UserError."""
    seen: dict[str, str] = {}
    for data in sets:
        other = seen.setdefault(data.name, data.folder)
        if Path(other).resolve() != Path(data.folder).resolve():
            raise UserError(f"{key}: {other} and {data.folder} are both called {data.name}: rename or link one")


def check_sets(spec: str | None, trained_on: Iterable[str] = ()) -> list[str]:
    """Opens every set of eval.data and decodes its first image. Returns a line about each, and a warning where it is of
    shards that are `trained_on`. Raises UserError.

    What can be known before a run: layouts, labels, class names, templates, headers of tars. No torch.
    """
    sets = open_sets(sources.split_sources(spec or ""), "eval.data")
    for data in sets:
        try:
            data.samples[0].read()
        except UserError as error:
            raise type(error)(f"eval.data: {error}") from None
    lines = [data.describe() for data in sets]
    trained = {os.path.realpath(shard) for shard in trained_on if not sources.is_remote(shard)}
    for data in sets if trained else ():
        shared = [path for path in dict.fromkeys(one.path for one in data.samples) if os.path.realpath(path) in trained]
        if shared:
            lines.append(
                f"{data.folder}: warning: it is trained on, {len(shared)} of its files are in data.train, the first"
                f" {printable(shared[0])}; a folder's shards are all below it: name that of the training split"
            )
    return lines


def _open_set(spec: str, split: str, task: str, classnames: str, templates: str, key: str) -> EvalSet:
    folder = Path(spec)
    found, shards = None, []
    if (task in ("auto", ASSOCIATION)) and (table := winogavil.table_in(folder)):
        return _checked(_games(table, spec), spec)
    if task == ASSOCIATION:
        raise UserError(f"{spec}: no {winogavil.TABLE} in it; association is WinoGAViL's task")
    if folders.is_list(folder):
        found, home = folders.read_list(folder), folder.parent
    elif not folder.is_dir() or _has_tars(folder):
        shards, home = _shards_of(folder, spec, split, key), folder
    else:
        found, home = folders.find(folder, split, classnames != "folder"), folder
        if found is None:
            raise UserError(f"{spec}: {_what_else(folder)}")
    is_multilabel = found is None and _said_of(folder) == MULTILABEL
    task = _task_of(folder, found is not None or classnames != "folder") if task == "auto" else task
    name = _name_of(folder)
    of_split = _asked_split(folder, split)
    if task == RETRIEVAL:
        if found is not None:
            raise UserError(f"{spec}: images without captions; they can be classified alone")
        samples = _read_tars(shards, _Wanted(task, False, may_lack_captions=_said_of(folder) == RETRIEVAL))
        return _checked(EvalSet(name, task, samples, folder=spec, asked=of_split), spec)
    hint = ", or --classnames FILE" if key == "--data" else ""
    if found is not None:
        with _named_by("--classnames", classnames):
            labels, chosen = names.number_labels(found.labels, home, classnames, hint)
        asked = _asked("classnames", classnames, chosen, lambda: names.number_labels(found.labels, home, "folder")[1])
        samples = _samples_of(found, labels)
    else:
        samples = _read_tars(shards, _Wanted(task, is_multilabel, False, known_name(name) in GROUPED))
        with _named_by("--classnames", classnames):
            chosen = names.class_names(folder, classnames, hint, known_name(name))
            _check_labels(samples, chosen, folder, is_multilabel)
        own_names = partial(names.class_names, folder, "folder", "", known_name(name))
        asked = _asked("classnames", classnames, chosen, own_names)
        if _is_suite(folder):
            samples = tuple(replace(sample, plain=True) for sample in samples)
    prompts: tuple[str, ...] = ()
    if templates != "none":
        hint = f", or --templates {names.OPENAI_7}" if key == "--data" else ""
        default = names.OPENAI_7 if found is not None else ""
        with _named_by("--templates", templates):
            prompts = names.templates(home, templates, default, hint, known_name(name))
        own_prompts = partial(names.templates, home, "folder", default, "", known_name(name))
        asked += _asked("templates", templates, prompts, own_prompts)
    note = "; ".join(part for part in (found.note if found else "", names.describe(prompts)) if part)
    return _checked(EvalSet(name, task, samples, chosen, prompts, spec, is_multilabel, note, asked + of_split), spec)


def _asked(
    option: str, choice: str, taken: Sequence[str], own: Callable[[], tuple[str, ...]]
) -> tuple[tuple[str, str], ...]:
    """The option, where the set has others of its own than what was asked for: its rows are then another set's."""
    if choice == "folder":
        return ()
    try:
        return () if own() == tuple(taken) else ((option, Path(choice).name),)
    except UserError:  # it has none
        return ()


def _asked_split(folder: Path, split: str) -> tuple[tuple[str, str], ...]:
    """The option, where it names another split than is taken without it."""
    if not split or not folder.is_dir():
        return ()
    try:
        usual = folders.choose_split(folder, "", [path.name for path in folder.iterdir() if path.is_dir()])
    except UserError:  # the training split alone, which is never taken unasked
        usual = ""
    return () if split == usual else (("split", split),)


@contextmanager
def _named_by(option: str, choice: str) -> Iterator[None]:
    """What is wrong with names or prompts that an option gave is that option's."""
    try:
        yield
    except UserError as error:
        raise error if choice == "folder" else type(error)(f"{option}: {error}") from None


def _games(table: Path, spec: str) -> EvalSet:
    images, games = winogavil.read(table)
    samples = tuple(_image(path, plain=True) for path in images)
    return EvalSet(_name_of(table.parent), ASSOCIATION, samples, folder=spec, games=games)


def _what_else(folder: Path) -> str:
    """What a folder without tars and images holds, of what is often taken for a set to evaluate on."""
    names_in = {path.name for path in folder.iterdir()} | {path.name for path in folder.glob("*/*")}
    if names_in & {"data_batch_1", "batches.meta", "meta"} and any(
        name.startswith(("test", "data_")) for name in names_in
    ):
        what = "CIFAR's pickles, which are never loaded, since they may run code"
    elif any(name.endswith(("-ubyte", "-ubyte.gz")) for name in names_in):
        what = "the files of MNIST, which are not read"
    elif any(name.endswith(".mat") for name in names_in):
        what = "files of Matlab, which are not read"
    else:
        return "neither tars nor images in it"
    return f"{what}; write a folder a class, or CLIP_benchmark's layout (clip_benchmark_export_wds does)"


def _checked(data: EvalSet, spec: str) -> EvalSet:
    """Refuses what any model scores perfectly on."""
    if len(data) < 2:
        raise UserError(f"{spec}: one image alone; nothing can be measured on it")
    if data.task == RETRIEVAL and not any(sample.captions for sample in data.samples):
        raise UserError(f"{spec}: no image has a caption; nothing can be measured on it")
    if data.task == CLASSIFICATION and len({(sample.label, sample.numbers) for sample in data.samples}) < 2:
        only = "the same" if data.is_multilabel else data.classnames[data.samples[0].label]
        raise UserError(f"{spec}: all {len(data)} images are of one class, {only!r}; nothing can be measured on it")
    return data


def _name_of(folder: Path) -> str:
    """What its rows call it: the folder's name, a link's own, with the one above it where that is a split's."""
    whole = folder.absolute()
    if whole.name == "..":
        whole = whole.resolve()
    elif whole.parent.name == "..":
        whole = whole.parent.resolve() / whole.name
    if whole.parent.name == "snapshots":  # of a download cache: datasets--ORG--NAME/snapshots/REVISION
        return whole.parent.parent.name.rpartition("--")[2]
    if whole.name.lower() in folders.SPLITS and whole.parent.name:
        return f"{whole.parent.name}_{whole.name}"
    return whole.name.removesuffix(".tar")


def _samples_of(found: folders.Found, labels: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(_image(path, label=labels[word]) for path, word in zip(found.images, found.labels))


def _image(path: Path, label: int = -1, plain: bool = False) -> Sample:
    """The sample of a file that is one image. Raises UserError for what is no ordinary file."""
    if not is_regular(path):
        raise UserError(f"{path}: not an ordinary file")
    return Sample(str(path), 0, path.stat().st_size, path.name, label=label, plain=plain)


def _is_suite(folder: Path) -> bool:
    """Whether it has the files of CLIP_benchmark's layout."""
    return any(is_regular(folder / name) for name in ("dataset_type.txt", "classnames.txt"))


def _said_of(folder: Path) -> str:
    """What dataset_type.txt says: classification | multilabel | retrieval; "" where there is none."""
    file = folder / "dataset_type.txt"
    if not is_regular(file):
        return ""
    folders.check_inside(file, folder)
    said = read_text(file).strip().lower()
    if said not in ("classification", MULTILABEL, RETRIEVAL):
        raise UserError(f"{file}: {said[:80]!r} is neither classification nor retrieval, nor multilabel")
    return said


def _task_of(folder: Path, has_labels: bool) -> str:
    if has_labels:
        return CLASSIFICATION
    said = _said_of(folder) or ("classification" if is_regular(folder / "classnames.txt") else RETRIEVAL)
    return RETRIEVAL if said == RETRIEVAL else CLASSIFICATION


def _has_tars(folder: Path) -> bool:
    """Whether a folder or a split in it holds tars, or says that it should."""
    return is_regular(folder / "dataset_type.txt") or bool(_splits_with_tars(folder)) or _holds_tars(folder)


def _holds_tars(folder: Path) -> bool:
    return is_regular(folder / "nshards.txt") or any(not path.name.startswith(".") for path in folder.glob("*.tar"))


def _splits_with_tars(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _holds_tars(path))


def _shards_of(folder: Path, spec: str, split: str, key: str) -> list[str]:
    """The tars of a split: as many as nshards.txt says, or, without it, every tar there is."""
    if not folder.is_dir():
        if split:
            raise UserError(f"{spec}: tars without splits; name the folder that holds {split!r}")
        return sources.expand_local(spec, key)
    holding = _splits_with_tars(folder)
    chosen = folders.choose_split(folder, split, holding)
    root = folder / chosen
    if not chosen and is_regular(folder / "dataset_type.txt"):
        raise UserError(f"{spec}: has no split 'test' with tars in it")
    counted = root / "nshards.txt"
    if not is_regular(counted):
        if is_regular(folder / "dataset_type.txt") and chosen == "test":
            raise UserError(f"{counted}: missing; it holds the number of tars in {root}")
        return sources.expand_local(str(root), key)
    folders.check_inside(counted, folder)
    text = read_text(counted, 1000).strip()
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise UserError(f"{counted}: {text[:40]!r} is not a number of tars")
    shards = []
    for number in range(int(text)):
        shards.append(str(root / f"{number}.tar"))
        if not is_regular(root / f"{number}.tar"):  # at the first: the number is only what somebody wrote down
            raise UserError(f"{shards[-1]}: missing; {counted} says {text}")
    return shards


@dataclass(frozen=True)
class _Wanted:
    """What is read of each sample beside its image."""

    task: str
    is_multilabel: bool = False
    may_lack_captions: bool = False
    """an image without a caption is a candidate of the texts, and never found by its own"""
    has_groups: bool = False


def _read_tars(shards: Sequence[str], wanted: _Wanted) -> tuple[Sample, ...]:
    samples = [sample for shard in shards for sample in _read_tar(shard, wanted)]
    if not samples:
        part = "label (.cls)" if wanted.task == CLASSIFICATION else "text"
        raise UserError(f"{shards[0]}: no image with a {part} in it")
    return tuple(samples)


def _read_tar(shard: str, wanted: _Wanted) -> list[Sample]:
    """The samples of one tar, in order. Raises UserError if it is empty or damaged, if a sample lacks its part, and for
    an image that is in no sample."""
    groups = []
    with open_regular(Path(shard)) as file:
        for item in group(scan(file, os.fstat(file.fileno()).st_size)):
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
        return [_sample(file, shard, one, wanted) for one in groups]


def _sample(file: BinaryIO, shard: str, one: Group, wanted: _Wanted) -> Sample:
    key, images = printable(one.key.lstrip("/")), [image for _, image in one.images()]
    if not images:
        raise UserError(f"{shard}: {key} has no image ({', '.join(IMAGES)})")
    if len(images) > 1:
        other = printable(images[1].name)
        raise UserError(f"{shard}: {key} has {len(images)} images, {other} too; {ADVICE['surplus image']}")
    for kind in ("txt", "json", "cls"):
        if kind not in one.members and len(one.of_types(kind)) > 1:
            raise UserError(f"{shard}: {key} has several .{kind} members and none is {key}.{kind}: which one counts?")
    if any(member.is_sparse for member in one.members.values()):
        raise UserError(f"{shard}: {key}: {ADVICE['sparse']}")
    place = images[0].offset, images[0].size
    if wanted.task == RETRIEVAL:
        captions = tuple(_captions(file, shard, key, one))
        if not captions and not (wanted.may_lack_captions and one.member("txt")):
            raise UserError(f"{shard}: {key} has no caption (.txt, or .json with `captions`)")
        return Sample(shard, *place, key, captions=captions)
    numbers = _numbers(file, shard, key, one) if wanted.is_multilabel or wanted.has_groups else ()
    if wanted.is_multilabel:
        if set(numbers) - {0, 1}:
            raise UserError(f"{shard}: {key}.npy holds other numbers than 0 and 1, one for each class")
        return Sample(shard, *place, key, numbers=numbers)
    label = one.member("cls")
    if label is None:
        raise UserError(f"{shard}: {key} has no label (.cls)")
    text = _text(shard, key, _content(file, shard, key, label)).strip()
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{shard}: {key}.cls holds {text[:40]!r}, not a label")
    return Sample(shard, *place, key, label=int(text), numbers=numbers)


def _numbers(file: BinaryIO, shard: str, key: str, one: Group) -> tuple[int, ...]:
    """The whole numbers of a sample's .npy. Raises UserError where it is missing or no small array of such."""
    member = one.member("npy")
    if member is None:
        raise UserError(f"{shard}: {key} has no .npy, which this set needs")
    content = io.BytesIO(_content(file, shard, key, member))
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError
        shape, _, kind = np.lib.format.read_array_header_1_0(content)
        held = content.read()
        if kind.kind not in "iufb" or len(shape) != 1 or len(held) != shape[0] * kind.itemsize:
            raise ValueError
        values = np.frombuffer(held, kind)
        if not np.isfinite(values).all() or (values != values.astype(np.int64)).any():
            raise ValueError
    except Exception:  # NumPy parses the header as Python's literals, and raises whatever that does
        raise UserError(f"{shard}: {key}.npy is no list of whole numbers") from None
    return tuple(values.astype(np.int64).tolist())


def _captions(file: BinaryIO, shard: str, key: str, one: Group) -> list[str]:
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


def _content(file: BinaryIO, shard: str, key: str, member: Member) -> bytes:
    if member.size > MAX_TEXT:
        raise UserError(f"{shard}: {key} has a text of {member.size} bytes")
    file.seek(member.offset)
    return file.read(member.size)


def _check_labels(samples: Sequence[Sample], classnames: tuple[str, ...], folder: Path, is_multilabel: bool) -> None:
    if is_multilabel:
        for sample in samples:
            if len(sample.numbers) != len(classnames):
                raise UserError(
                    f"{sample.place}: {len(sample.numbers)} labels, and there are {len(classnames)} classes"
                )
        return
    largest = max(samples, key=lambda sample: sample.label)
    if largest.label >= len(classnames):
        raise UserError(
            f"{largest.path}: {largest.key} has label {largest.label}, and there are {len(classnames)} class names"
        )
    distinct = len({sample.label for sample in samples})
    if distinct > len(classnames):
        raise UserError(f"{folder}: {distinct} labels and {len(classnames)} class names")
