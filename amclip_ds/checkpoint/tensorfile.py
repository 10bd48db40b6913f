"""A checkpoint's safetensors files: written, and read strictly (safetensors_header.py) element by element.

Names are `kind|parameter|start|length`:
the elements [start, start + length) of the flattened parameter.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from amclip_ds import files, safetensors_header
from amclip_ds.errors import NotRead, UserError
from amclip_ds.safetensors_header import Entry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 64 << 20  # bytes a read holds beside the tensor that it fills


class DamagedError(ValueError):
    """A file of a checkpoint is not what it should be; the message names the file."""


def unread(path: Path | str, error: OSError) -> UserError | DamagedError:
    """The error of a checkpoint's file that cannot be read: damage, but NotRead where the machine is to blame, which
    says nothing of the checkpoint."""
    failure = files.not_read(f"{path}: cannot be read", error)
    return failure if isinstance(failure, NotRead) else DamagedError(str(failure))


def dtype_of(entry: Entry) -> torch.dtype:
    return DTYPES[entry.dtype]


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
    """What a file holds, and where its data begins. Raises DamagedError, NotRead. Memory is bounded by the file's own
    size."""
    try:
        header = safetensors_header.read(path, follow=False)
    except NotRead:
        raise
    except UserError as error:
        raise DamagedError(str(error)) from None
    for name, entry in header.entries.items():
        if entry.dtype not in DTYPES:
            raise DamagedError(f"{path}: {name[:200]!r} is of {entry.dtype}, which no checkpoint has")
    return header.entries, header.data_begin


def open_regular(path: Path) -> BinaryIO:
    """Opens an ordinary file for reading: no link, pipe or device. Raises OSError."""
    return files.open_regular(path, follow=False)


def read_elements(file: Any, begin: int, entry: Entry, start: int, out: Tensor) -> None:
    """Fills `out` [n], of any dtype and device, with the elements [start, start + n) of an entry. Raises DamagedError,
    NotRead.

    file: as `open_regular` returned it. begin: where its data begins.
    """
    dtype = dtype_of(entry)
    size = element_size(dtype)
    direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
    per_chunk = CHUNK // size
    for first in range(0, out.numel(), per_chunk):
        part = out[first : first + per_chunk]
        into = part if direct else torch.empty(part.shape, dtype=dtype)
        _read_exactly(file, begin + entry.begin + (start + first) * size, bytes_of(into))
        if not direct:
            part.copy_(into)


def _read_exactly(file: Any, offset: int, into: memoryview) -> None:
    while into:
        try:
            count = os.preadv(file.fileno(), [into], offset)
        except OSError as error:
            raise unread(file.name, error) from None
        if count == 0:
            raise DamagedError(f"{file.name}: ended at byte {offset}, before its tensors do")
        into, offset = into[count:], offset + count
