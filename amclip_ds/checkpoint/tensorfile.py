"""safetensors headers, written and read strictly: nothing is believed that the bytes of the file do not bear out.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes. Names are `kind|parameter|start|length`:
the elements [start, start + length) of the flattened parameter.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 << 20  # the format allows more; a rank's thousand tensors take 100 kB
MAX_DIMENSIONS = 16
CHUNK = 64 << 20  # bytes a read holds beside the tensor that it fills


class DamagedError(ValueError):
    """A file of a checkpoint is not what it should be; the message names the file."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file: bytes [begin, end) after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def element_size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def build_header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes before the data of tensors that follow in the given order; the data begins 64-byte aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_header(path: Path) -> tuple[dict[str, Entry], int]:
    """What a file holds, and where its data begins. Raises DamagedError. Memory is bounded by the file's own size."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise DamagedError(f"{path}: its header claims {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path}: not a safetensors file: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise DamagedError(f"{path}: its header is not an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_layout(path, entries, size - 8 - length)
    return entries, 8 + length


def open_regular(path: Path) -> Any:
    """Opens an ordinary file for reading: no link, pipe or device. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(22, "not an ordinary file", str(path))
    return os.fdopen(descriptor, "rb")


def read_elements(file: Any, begin: int, entry: Entry, start: int, out: Tensor) -> None:
    """Fills `out` [n], of any dtype and device, with the elements [start, start + n) of an entry. Raises DamagedError.

    file: as `open_regular` returned it. begin: where its data begins.
    """
    size = element_size(entry.dtype)
    direct = out.device.type == "cpu" and out.dtype == entry.dtype and out.is_contiguous()
    per_chunk = CHUNK // size
    for first in range(0, out.numel(), per_chunk):
        part = out[first : first + per_chunk]
        into = part if direct else torch.empty(part.shape, dtype=entry.dtype)
        _read_exactly(file, begin + entry.begin + (start + first) * size, bytes_of(into))
        if not direct:
            part.copy_(into)


def _read_exactly(file: Any, offset: int, into: memoryview) -> None:
    while into:
        try:
            count = os.preadv(file.fileno(), [into], offset)
        except OSError as error:
            raise DamagedError(f"{file.name}: cannot be read: {error.strerror}") from None
        if count == 0:
            raise DamagedError(f"{file.name}: ended at byte {offset}, before its tensors do")
        into, offset = into[count:], offset + count


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return found


def _entry(path: Path, name: str, value: Any) -> Entry:
    try:
        dtype = DTYPES[value["dtype"]]
        shape = tuple(value["shape"])
        begin, end = value["data_offsets"]
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError
        whole = [number for number in (*shape, begin, end) if type(number) is int and number >= 0]
        elements = 1
        for number in shape:
            elements *= number
        if len(whole) != len(shape) + 2 or set(value) != {"dtype", "shape", "data_offsets"}:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DamagedError(f"{path}: the header's entry {name[:200]!r} is not a tensor's") from None
    if end - begin != elements * element_size(dtype):
        raise DamagedError(f"{path}: {name[:200]!r} claims {end - begin} bytes for shape {list(shape)[:8]}")
    return Entry(dtype, shape, begin, end)


def _check_layout(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Tensors lie end to end: no overlap, no hole, nothing outside."""
    offset = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != offset:
            what = "overlaps the one before" if entry.begin < offset else "leaves a hole before it"
            raise DamagedError(f"{path}: {name[:200]!r} {what}")
        offset = entry.end
    if offset != size:
        raise DamagedError(f"{path}: its tensors take {offset} bytes, it has {size}")
