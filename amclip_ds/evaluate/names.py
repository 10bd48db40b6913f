"""Class names and prompt templates: read from the set's folder, from a file, or the ones ImageNet is measured with.

A wrong line moves every later label by one, so files are read strictly: what is not one name a line is refused with the
line's number. No torch: the lists of open_clip and timm are read without importing either.
"""

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from amclip_ds.errors import UserError
from amclip_ds.evaluate.folders import WNID, check_inside
from amclip_ds.files import is_regular, read_json, read_text
from amclip_ds.module_alone import folder_of, import_alone

OPENAI_7 = "openai-7"
"""CLIP's choice of 7 of its 80 ImageNet prompts (its notebook), which SLIP and A-CLIP report with."""
MAX_LINES = 16 << 20  # bytes of class names or templates
IMAGENET = 1000
NUMBER = re.compile(r"[0-9]{1,6}")


@lru_cache(maxsize=1)
def imagenet() -> dict[str, str]:
    """wnid -> name of ImageNet's thousand classes, in the order of the wnids, which is the order of the labels."""
    wnids = (folder_of("timm") / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    assert wnids == sorted(wnids) and len(wnids) == IMAGENET
    return dict(zip(wnids, import_alone("open_clip", "zero_shot_metadata").IMAGENET_CLASSNAMES, strict=True))


def read_lines(file: Path, holds: str) -> tuple[str, ...]:
    """A name or template a line. Raises UserError, with the line's number, for a blank one or a control character."""
    if not is_regular(file):
        raise UserError(f"{file}: missing; it holds {holds}")
    lines = [line.strip() for line in read_text(file, MAX_LINES).removeprefix("\ufeff").rstrip().split("\n")]
    if lines == [""]:
        raise UserError(f"{file}: empty; it holds {holds}")
    for number, line in enumerate(lines, 1):
        if not line:
            raise UserError(f"{file}: line {number} is blank; it holds {holds}")
        _check_printable(line, f"{file}: line {number}")
    return tuple(lines)


def _check_printable(name: str, place: str) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(f"{place}: {name[:60]!r} has a control character in it")


def read_of(folder: Path, name: str, holds: str) -> tuple[str, ...]:
    """The same of a file in a set's folder."""
    check_inside(folder / name, folder)
    return read_lines(folder / name, holds)


def of_clip_benchmark(kind: str, name: str) -> tuple[str, ...]:
    """The English class names or templates that an installed CLIP_benchmark has for a set; () where it has none.

    kind: classnames | zeroshot_classification_templates. Its lists are read without importing it.
    """
    spec = importlib.util.find_spec("clip_benchmark")
    if not name or spec is None or not spec.submodule_search_locations:
        return ()
    file = Path(spec.submodule_search_locations[0]) / "datasets" / f"en_{kind}.json"
    return tuple(read_json(file, dict).get(name, ())) if is_regular(file) else ()


def class_names(folder: Path, choice: str, hint: str = "", name: str = "") -> tuple[str, ...]:
    """Names in the order of the labels. choice: folder | imagenet | a file. hint: another way to give them.

    name: of a public set, whose names an installed CLIP_benchmark may have where the folder has none.
    """
    holds = "one class name a line, in the order of the labels"
    if choice == "imagenet":
        return tuple(imagenet().values())
    if choice == "folder" and not is_regular(folder / "classnames.txt"):
        if known := of_clip_benchmark("classnames", "caltech101_vtab" if name == "caltech101" else name):
            return known
        raise UserError(f"{folder / 'classnames.txt'}: missing, and numbers are no names; it holds {holds}{hint}")
    file = folder / "classnames.txt" if choice == "folder" else Path(choice)
    found = read_of(folder, "classnames.txt", holds) if choice == "folder" else read_lines(file, holds)
    _check_distinct(found, [f"{file}: line {number}" for number in range(1, len(found) + 1)])
    return found


def _check_distinct(names: Sequence[str], places: Sequence[str]) -> None:
    """Two classes of one name cannot be distinguished by any model. ImageNet's own thousand have two such pairs."""
    seen: dict[str, str] = {}
    for name, place in zip(names, places):
        plain = " ".join(name.lower().split())  # as the tokenizer sees it
        if plain in seen and len(names) != IMAGENET:
            raise UserError(f"{place} is {name!r}, as is {seen[plain].rpartition(': ')[2]}: two classes of one name")
        seen.setdefault(plain, place)


def number_labels(
    found: Sequence[str], folder: Path, choice: str, hint: str = ""
) -> tuple[dict[str, int], tuple[str, ...]]:
    """({word: label}, the class names) for the words by which images are labelled: wnids, numbers or names.

    A number N is the label N: line N + 1 of the names. Raises UserError where it is not clear what the words mean.
    """
    words = sorted(set(found))
    wnids, numbers = [[w for w in words if kind.fullmatch(w)] for kind in (WNID, NUMBER)]
    has_names = choice != "folder" or is_regular(folder / "classnames.txt")
    if wnids and len(wnids) < len(words):
        other = next(word for word in words if word not in wnids)
        raise UserError(f"{folder}: some classes are wnids ({wnids[0]}), some are not ({other[:80]!r})")
    if wnids and (choice == "imagenet" or not has_names):
        return _of_imagenet(wnids, folder, choice, hint)
    if len(numbers) == len(words):
        names = class_names(folder, choice, hint)
        largest = max(words, key=int)
        if int(largest) >= len(names):
            raise UserError(f"{folder}: there is a label {largest}, and {len(names)} class names, of labels from 0")
        return {word: int(word) for word in words}, names
    if numbers:
        raise UserError(f"{folder}: some classes are numbers ({numbers[0]}), some are not")
    if not has_names:
        for word in words:
            _check_printable(word, str(folder))
        names = tuple(" ".join(word.replace("_", " ").split()) for word in words)
        _check_distinct(names, [f"{folder}: {word!r}" for word in words])
        return {word: label for label, word in enumerate(words)}, names
    if choice == "imagenet":
        raise UserError(f"{folder}: the classes ({words[0][:80]!r}, ...) are neither wnids nor labels of ImageNet")
    names = class_names(folder, choice, hint)
    if len(names) != len(words):
        raise UserError(f"{folder}: {len(words)} classes ({words[0][:80]!r}, ...) and {len(names)} class names")
    return {word: label for label, word in enumerate(words)}, names


def _of_imagenet(wnids: Sequence[str], folder: Path, choice: str, hint: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Known wnids: all of ImageNet's classes where those were asked for, else the ones that are there."""
    known = imagenet()
    strange = [wnid for wnid in wnids if wnid not in known]
    if strange:
        raise UserError(
            f"{folder}: {len(strange)} of {len(wnids)} wnids are not of ImageNet's thousand ({', '.join(strange[:3])}):"
            f" write {folder / 'classnames.txt'}, a name a line in the order of the wnids{hint}"
        )
    classes = list(known) if choice == "imagenet" else wnids
    _check_distinct([known[wnid] for wnid in classes], [f"{folder}: {wnid!r}" for wnid in classes])
    return {wnid: label for label, wnid in enumerate(classes)}, tuple(known[wnid] for wnid in classes)


def templates(folder: Path, choice: str, default: str, hint: str = "", name: str = "") -> tuple[str, ...]:
    """Prompts with `{c}` for the class name. choice: folder | openai-7 | openai-80 | a file.

    default: what is taken where the folder has none; "": nothing, it is refused.
    """
    file = folder / "zeroshot_classification_templates.txt" if choice == "folder" else Path(choice)
    holds = "one prompt a line, with {c} for the class name"
    if choice == "folder" and not is_regular(file):
        if not default and (known := of_clip_benchmark("zeroshot_classification_templates", name)):
            return known
        if not default:
            raise UserError(f"{file}: missing; it holds {holds}{hint}")
        choice = default
    if choice in (OPENAI_7, "openai-80"):
        lists = import_alone("open_clip", "zero_shot_metadata")
        functions = lists.SIMPLE_IMAGENET_TEMPLATES if choice == OPENAI_7 else lists.OPENAI_IMAGENET_TEMPLATES
        return tuple(function("{c}") for function in functions)
    found = read_of(folder, file.name, holds) if choice == "folder" else read_lines(file, holds)
    for number, template in enumerate(found, 1):
        if "{c}" not in template:
            raise UserError(f"{file}: line {number}: {template[:60]!r} has no {{c}} for the class name")
    return found


def describe(prompts: Sequence[str]) -> str:
    """Which they are, for people."""
    for name in (OPENAI_7, "openai-80"):
        if list(prompts) == list(templates(Path(), name, "")):
            return f"{name} templates"
    return f"{len(prompts)} {'template' if len(prompts) == 1 else 'templates'}" if prompts else ""
