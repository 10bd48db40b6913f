"""safetensors headers, read strictly: nothing is believed that the bytes of the file do not bear out.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes, end to end. Every file from outside is read
through here before a library opens it: types, shapes and offsets are checked against the file's own size.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds.errors import UserError, in_one_line
from amclip_ds.files import not_read, open_regular

BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
MAX_HEADER = 16 << 20  # the format allows more; a rank's thousand tensors take 100 kB
MAX_DIMENSIONS = 16
PIECE = re.compile(r"([a-z_0-9]{1,64})\|([^|]{1,1000})\|([0-9]{1,18})\|([0-9]{1,18})")
"""How a checkpoint's files name elements [start, start + length) of a parameter: `kind|parameter|start|length`."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in a file: bytes [begin, end) after the header."""

    dtype: str
    """the format's name of it: F32, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_begin: int
    """the byte at which the tensors begin"""


def read(path: Path, *, follow: bool = True) -> Header:
    """The header of an ordinary file. Raises UserError, naming it. Memory is bounded by the file's own size.

    follow: whether the path itself may be a symbolic link, as in a cache of downloads.
    """
    try:
        with open_regular(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(f"{path}: its header claims {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise not_read(str(path), error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file: {in_one_line(error, 200)}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: the header's __metadata__ is not texts by name")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return Header(entries, metadata, 8 + length)


def step_of(path: Path, metadata: dict[str, str]) -> int:
    """The step that a run's weights say they are of; 0 where they do not say. Raises UserError."""
    text = metadata.get("step", "0")
    if not re.fullmatch("[0-9]{1,12}", text):
        raise UserError(f"{path}: its metadata's step {text[:40]!r} is no number of a step")
    return int(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice in the header")
    return found


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: the header's entry {name[:200]!r} is not a tensor's")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS or not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: the header's entry {name[:200]!r} is not a tensor's")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise UserError(f"{path}: the header's entry {name[:200]!r} is not a tensor's: its shape is none")
    elements = 1
    for number in shape:
        elements *= number
    if (offsets[1] - offsets[0]) * 8 != elements * BITS[dtype]:
        claimed = offsets[1] - offsets[0]
        raise UserError(f"{path}: {name[:200]!r} claims {claimed} bytes for shape {shape[:8]} of {dtype}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    """Types first: a list of ordinary numbers, before anything is computed with them."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _check_layout(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Tensors are end to end: no overlap, no hole, nothing outside."""
    offset = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != offset:
            what = "overlaps the one before" if entry.begin < offset else "leaves a hole before it"
            raise UserError(f"{path}: {name[:200]!r} {what}")
        offset = entry.end
    if offset != size:
        raise UserError(f"{path}: its tensors take {offset} bytes, it has {size}")
