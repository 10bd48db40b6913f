"""Mutations of folders, by number: the same number spoils the same folder in the same way, every time."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TREES = (".json", ".jsonl", ".yaml")
LARGEST = 1 << 28  # bytes; a sparse file of an earlier mutation is not read here
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    1e308,
    -0.0,
    2**31,
    2**63,
    2**70,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../..",
    "\x1b[2J",
    "../../outside/secret.safetensors",
    "/dev/zero",
    "/etc/passwd",
    "${oc.env:HOME}",
    "hf-hub:stranger/model",
    "local-dir:/etc",
    "https://stranger.example/x",
    "pipe:gs",
    "trap.Model",
    "x" * 5000,
    "1" * 5000,
    "\u202e",
    "\ud800",
    [],
    {},
    [[]],
    [1, 2],
    [0.5, 0.5, 0.5],
    {"a": {"b": {"c": []}}},
    [10**9] * 3,
    {"trust_remote_code": True},
    "???",
]
KEYS = [
    "auto_map",
    "trust_remote_code",
    "hf_tokenizer_name",
    "hf_model_name",
    "tokenizer_kwargs",
    "custom_text",
    "url",
    "file",
    "hf_hub_id",
    "custom_load",
    "quantization_config",
    "_attn_implementation",
    "image_processor_type",
    "recipe",
    "multimodal_cfg",
    "timm_model_name",
    "model_type",
    "architecture",
    "__class__",
    "_target_",
    "unheard_of",
    "",
]


def mutate(folder: Path, number: int) -> str:
    """Spoils one to three things of a folder. Returns what was done."""
    rng = random.Random(number)
    return "; ".join(_once(folder, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _once(folder: Path, rng: random.Random) -> str:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.stat().st_size < LARGEST
    )
    if not files:
        return "nothing left"
    small = [path for path in files if path.suffix in TREES]
    path = rng.choice(small if small and rng.random() < 0.5 else files)
    ways: list[Callable[[Path, random.Random], str]] = [_bytes]
    if path.suffix == ".json" and path.stat().st_size < 100_000:
        ways += [_tree] * 6
    elif path.suffix == ".jsonl":
        ways += [_row] * 6
    elif path.suffix == ".yaml":
        ways += [_lines] * 6
    elif path.suffix == ".safetensors":
        ways += [_header] * 3
    elif path.suffix == ".txt":
        ways += [_text] * 3
    way = _place if rng.random() < 0.12 else rng.choice(ways)
    _own(path)
    return f"{path.relative_to(folder)}: {way(path, rng)}"


def _own(path: Path) -> None:
    """The folder's files are links to the original's: the one to be spoilt becomes a copy."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def _bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    way = rng.choice(("flip", "cut", "extend", "zero", "repeat", "empty", "noise"))
    at = rng.randrange(len(content) or 1) if rng.random() < 0.5 else rng.randrange(min(len(content) or 1, 512))
    if way == "flip":
        for _ in range(rng.choice((1, 1, 8, 64))):
            if content:
                content[rng.randrange(len(content)) if rng.random() < 0.5 else at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del content[at:]
    elif way == "extend":
        content += rng.randbytes(rng.choice((1, 100, 4096)))
    elif way == "zero":
        content[at : at + 600] = bytes(len(content[at : at + 600]))
    elif way == "repeat":
        content[at:at] = content[at : at + 700]
    elif way == "empty":
        content.clear()
    else:
        content[at : at + 64] = rng.randbytes(64)
    path.write_bytes(content)
    return f"{way} at {at}"


def _tree(path: Path, rng: random.Random) -> str:
    """A value, a key, or a place of a JSON file."""
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return _bytes(path, rng)
    done = _spoilt(content, rng)
    path.write_text(json.dumps(content))
    return done or _bytes(path, rng)


def _row(path: Path, rng: random.Random) -> str:
    """A value, a key, or a place of one row of a run's file."""
    lines = path.read_text(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    try:
        row = json.loads(lines[at])
    except ValueError:
        return _bytes(path, rng)
    done = _spoilt(row, rng, [*VALUES, 10**400])
    lines[at] = json.dumps(row)
    path.write_text("\n".join(lines), errors="replace")
    return f"row {at}: {done}"


def _spoilt(content: Any, rng: random.Random, values: list[Any] = VALUES) -> str:
    """Changes one place of a JSON value. Returns what was done; empty where it has no places."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(value)

    walk(content)
    if not places:
        return ""
    node, key = rng.choice(places)
    way = rng.choice(("set", "set", "set", "remove", "add", "rename"))
    if way == "set":
        node[key] = rng.choice(values)
    elif way == "remove":
        del node[key]
    elif isinstance(node, dict) and way == "add":
        node[rng.choice(KEYS)] = rng.choice(values)
    elif isinstance(node, dict):
        node[rng.choice(KEYS)] = node.pop(key)
    return f"{way} at {key!r}"


def _lines(path: Path, rng: random.Random) -> str:
    """A line of a yaml file: another value, an alias, a tag, another depth."""
    lines = path.read_text(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    key = lines[at].split(":")[0]
    value = rng.choice(
        (
            json.dumps(rng.choice(VALUES)),
            "!!python/object/apply:os.system [gs]",
            "&a [*a]",
            "*nobody",
            "!x y",
            "{a: &b [1], c: *b}",
            "'",
            "[",
            "|",
            "- 1",
            "${oc.env:HOME}",
            "\t",
            "? x",
        )
    )
    way = rng.choice(("set", "set", "set", "remove", "double", "indent", "add"))
    if way == "set":
        lines[at] = f"{key}: {value}"
    elif way == "remove":
        del lines[at]
    elif way == "double":
        lines.insert(at, lines[at])
    elif way == "indent":
        lines[at] = "  " + lines[at]
    else:
        lines.insert(at, f"{rng.choice(KEYS)}: {value}")
    path.write_text("\n".join(lines), errors="replace")
    return f"{way} line {at + 1}: {value}"


def _text(path: Path, rng: random.Random) -> str:
    lines = path.read_text(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    lines[at] = str(rng.choice(VALUES))
    path.write_text("\n".join(lines), errors="replace")
    return f"line {at + 1}: {lines[at][:20]!r}"


def _header(path: Path, rng: random.Random) -> str:
    """A safetensors file whose header says something else of its tensors."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        name = rng.choice(sorted(header))
        entry = header[name]
        part = rng.choice(("dtype", "shape", "data_offsets", "name", "gone"))
        if part == "name":
            header[rng.choice(("x", "", name + ".x", "\x1b[2J", "a|b|0|1"))] = header.pop(name)
        elif part == "gone":
            del header[name]
        elif part == "dtype":
            entry[part] = rng.choice(("F16", "I64", "F64", "BOOL", "C64", "", None, 7))
        else:
            entry[part] = rng.choice(([3_000_000_000, "x"], [2**62, 2**62], [-1], [], None, "x", [0, 0], [1.5], [[1]]))
    except (ValueError, TypeError, AttributeError, IndexError):
        return _bytes(path, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"{part} of {name}"


def _place(path: Path, rng: random.Random) -> str:
    """What is at the file's name is something else, or is elsewhere."""
    way = rng.choice(
        ("gone", "folder", "pipe", "link out", "link to itself", "device", "sparse", "swapped", "unreadable")
    )
    others = sorted(
        other
        for other in path.parent.iterdir()
        if other.is_file() and not other.is_symlink() and other != path and other.stat().st_size < LARGEST
    )
    if way == "swapped" and others:
        other = rng.choice(others)
        content = other.read_bytes()
        _own(other)
        other.write_bytes(path.read_bytes())
        path.write_bytes(content)
        return f"swapped with {other.name}"
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "link out":
        path.symlink_to(os.environ["MUTATION_OUTSIDE"])
    elif way == "link to itself":
        path.symlink_to(path)
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way == "sparse":
        with path.open("wb") as file:
            file.truncate(4 << 30)
    return way


def copy_by_links(source: Path, target: Path) -> None:
    """A folder whose files are hard links: a mutation pays for what it spoils only."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)
