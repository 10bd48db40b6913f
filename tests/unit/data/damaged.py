"""Tars for the tests, whole and damaged, built byte by byte where no library would write them."""

import functools
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = 512
File = tuple[str, bytes]


def picture(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    """An encoded image of smooth noise; other seeds, other pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(encoded, kind)
    return encoded.getvalue()


def sample(number: int, **members: bytes | None) -> list[File]:
    """The files of one sample; `jpg=..., txt=...` replace a member, None leaves it out."""
    contents: dict[str, bytes | None] = {"jpg": picture(number), "txt": f"picture number {number}".encode()} | members
    return [(f"{number:06d}.{suffix}", content) for suffix, content in contents.items() if content is not None]


def samples(numbers: Iterable[int]) -> list[File]:
    """The files of whole samples."""
    return [file for number in numbers for file in sample(number)]


def tar_of(files: Iterable[File | tarfile.TarInfo], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar; a TarInfo is a member without content (links, devices)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tar_format) as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
            else:
                info = tarfile.TarInfo(file[0])
                info.size = len(file[1])
                tar.addfile(info, io.BytesIO(file[1]))
    return content.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A link, device or folder."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header_at(tar: bytes, name: str) -> int:
    """Where a member's header starts."""
    return tar.index(name.encode() + b"\0") // BLOCK * BLOCK


def flip(content: bytes, offset: int, bits: int = 0xFF) -> bytes:
    """One byte changed."""
    changed = bytearray(content)
    changed[offset] ^= bits
    return bytes(changed)


def with_flipped_headers(tar: bytes, *names: str) -> bytes:
    """Headers whose checksum no longer fits."""
    for name in names:
        tar = flip(tar, header_at(tar, name) + 100)
    return tar


def renamed(tar: bytes, name: str, new: bytes) -> bytes:
    """A member under any name at all, its checksum made to fit."""
    return _rewritten(tar, name, 0, new.ljust(100, b"\0"))


def resized(tar: bytes, name: str, size: int) -> bytes:
    """A header that claims another size (base 256), its checksum made to fit."""
    return _rewritten(tar, name, 124, b"\x80" + size.to_bytes(11, "big"))


def _rewritten(tar: bytes, name: str, offset: int, field: bytes) -> bytes:
    start = header_at(tar, name)
    header = bytearray(tar[start : start + BLOCK])
    header[offset : offset + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return tar[:start] + bytes(header) + tar[start + BLOCK :]


@functools.cache
def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels (in hundreds): three bytes a pixel once decoded, a thousandth of that here."""
    packer, hundred_rows = zlib.compressobj(), bytes(100 * (1 + 3 * side))
    packed = b"".join(packer.compress(hundred_rows) for _ in range(side // 100))
    size = side.to_bytes(4, "big")
    chunks = (b"IHDR", size + size + b"\x08\x02\0\0\0"), (b"IDAT", packed + packer.flush()), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks
    )


class Trap:
    """Unpickled, it writes a file: proof that somebody unpickled it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (self.file,))


def pickled_trap(file: Path) -> bytes:
    """A pickle that touches `file` when it is loaded."""
    return pickle.dumps(Trap(file))


def json_fields(**fields: object) -> bytes:
    return json.dumps(fields).encode()
