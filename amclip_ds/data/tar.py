"""Reads the headers of a tar without its contents, and goes on behind a damaged header instead of stopping silently."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from amclip_ds.data.kinds import HEAD, kind_of

BLOCK = 512
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
MAX_NAME_BYTES = 1 << 16  # a longer "long name" is damage, not a name


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int
    """of its content, in bytes from the start of the tar"""
    size: int


@dataclass(frozen=True)
class Damage:
    """What could not be read."""

    kind: str
    """header | truncated | name | zeros"""
    offset: int
    cause: str
    num_bytes: int = 0
    """how much lies between the last member before and the next one behind it"""


def scan(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """The regular members of a tar of `size` bytes, in order; links, devices and folders are left out.

    A damaged header is told and skipped to the next valid one; so are zeros between members (joined tars, or a hole),
    behind which other readers see nothing, a member cut off by the end of the file, and a missing end mark.
    """
    offset, long_name, ended, zeros_from = 0, "", False, 0
    while offset + BLOCK <= size:
        file.seek(offset)
        block = file.read(BLOCK)
        if block.count(0) == BLOCK:
            zeros_from = zeros_from if ended else offset
            ended = True
            offset += BLOCK
            continue
        if ended:
            yield Damage("zeros", offset, f"before byte {offset}: joined tars, or a hole", offset - zeros_from)
            ended = False
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.HeaderError("negative size")
        except (tarfile.HeaderError, ValueError) as error:
            following = _next_header(file, offset + BLOCK, size)
            what = kind_of(block) if offset == 0 else ""
            cause = f"is {what}" if what else f"at byte {offset}: {error}"
            yield Damage("header", offset, cause, following - offset)
            offset, long_name = following, ""
            continue
        if header.type in WITHOUT_CONTENT:
            header.size = 0  # whatever it says: a link cannot hide the members behind it
        content, following = offset + BLOCK, offset + BLOCK + -(-header.size // BLOCK) * BLOCK
        if content + header.size > size:
            yield Damage("truncated", offset, f"{header.name!r} needs {header.size} bytes, {size - content} are left")
            return
        offset = following
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            name = _long_name(file, content, header)
            if name is None:
                yield Damage("name", content, "unreadable long name")
            long_name = name or ""
            continue
        if header.isreg() and not header.issparse():
            yield Member(long_name or header.name, content, header.size)
        if header.type != tarfile.GNUTYPE_LONGLINK:  # it may stand between a long name and its member
            long_name = ""
    if not ended:
        file.seek(0)
        what = kind_of(file.read(HEAD)) if offset == 0 else ""
        cause = f"is {what}" if what else "has no end mark, was cut short"
        yield Damage("truncated", offset, cause if size else "is empty: 0 bytes")


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix in lower case) of a member: the key ends at the first dot of the base name (webdataset's rule).

    The key is empty for a hidden file, such as the `._name` files of macOS: it belongs to no sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), suffix.lower()


def printable(name: str) -> str:
    """A name from a tar, as it may reach a terminal or a record: what cannot be printed is spelt as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def _long_name(file: BinaryIO, offset: int, header: tarfile.TarInfo) -> str | None:
    """The name that a GNU long-name or pax header gives to the next member; "" if a pax header gives none."""
    if header.size > MAX_NAME_BYTES:
        return None
    file.seek(offset)
    content = file.read(header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while content:
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(content):
            return None
        record, content = content[len(length) + 1 : int(length) - 1], content[int(length) :]
        if record.startswith(b"path="):
            return record.removeprefix(b"path=").decode("utf-8", "surrogateescape")
    return ""


def _next_header(file: BinaryIO, offset: int, size: int) -> int:
    """The first offset from here on with a valid ustar header; the end of the file if there is none."""
    while offset + BLOCK <= size:
        file.seek(offset)
        chunk = file.read(1 << 20)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar":
                try:
                    tarfile.TarInfo.frombuf(chunk[start : start + BLOCK], "utf-8", "surrogateescape")
                    return offset + start
                except tarfile.HeaderError:
                    continue
        offset += max(BLOCK, len(chunk) // BLOCK * BLOCK)
    return size
