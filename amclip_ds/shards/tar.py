"""Reads the headers of a tar without its contents, and behind a damaged header instead of stopping silently."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from amclip_ds.shards.kinds import HEAD, kind_of

BLOCK = 512
ZEROS = 1 << 20
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
WITHOUT_CONTENT = (*LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
SPARSE, SPARSE_NAME = "GNU.sparse", "GNU.sparse.name"
MAX_NAME_BYTES = 1 << 16  # a longer name is damage, not a name
MAX_SHARED_NAME = 1 << 10  # bytes of a name that a global header gives to every member: it costs nothing to write
MAX_PAX_BYTES = 1 << 20  # of a pax header: it may carry extended attributes, of 64 KiB each


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int
    """of its content, in bytes from the start of the tar"""
    size: int
    is_sparse: bool = False
    """its content is there without its holes: not the file's bytes"""


@dataclass(frozen=True, slots=True)
class Link:
    """A hard or symbolic link: a name without content."""

    name: str


@dataclass(frozen=True)
class Damage:
    """What could not be read."""

    kind: str
    """header | truncated | name | zeros"""
    offset: int
    """where, in bytes from the start of the tar"""
    cause: str
    """the same words for the same fault, wherever it is"""
    num_bytes: int = 0
    """how much is between the last member before and the next one behind it"""

    def __str__(self) -> str:
        return f"at byte {self.offset}: {self.cause}"


def scan(file: BinaryIO, size: int) -> Iterator[Member | Link | Damage]:
    """The regular members of a tar of `size` bytes, in order, as tarfile reads them, and its links; devices and folders
    are left out.

    A damaged header is named and skipped to the next valid one; so are zeros between members (joined tars, or a hole),
    behind which other readers see nothing, a member cut off by the end of the file, and a missing end mark.
    """
    offset, ended, zeros_from = 0, False, 0
    shared: dict[str, str] = {}  # what pax headers say of all members that follow, and of the next one
    own: dict[str, str] = {}
    while offset + BLOCK <= size:
        file.seek(offset)
        block = file.read(BLOCK)
        if block.count(0) == BLOCK:
            zeros_from = zeros_from if ended else offset
            ended = True
            offset = _after_zeros(file, offset + BLOCK, size)
            continue
        if ended:
            yield Damage("zeros", offset, "zeros before it: joined tars, or a hole", offset - zeros_from)
            ended = False
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            facts = {} if header.type in EXTENSIONS else shared | own
            stored = _stored_size(header, facts)
        except (tarfile.HeaderError, ValueError) as error:
            following = _next_header(file, offset + BLOCK, size)
            what = kind_of(block) if offset == 0 else ""
            yield Damage("header", offset, f"is {what}" if what else str(error), following - offset)
            offset, own = following, {}
            continue
        content = offset + BLOCK + (_sparse_maps(file, offset, size) if header.type == tarfile.GNUTYPE_SPARSE else 0)
        if content + stored > size:
            yield Damage("truncated", offset, "a member continues behind the end of the file")
            return
        start, offset = offset, content + -(-stored // BLOCK) * BLOCK
        if header.type in EXTENSIONS:
            records = _records(file, content, header)
            if records is None:
                yield Damage("name", start, "an unreadable long name or pax header")
            elif header.type == tarfile.XGLTYPE:
                shared |= records
            else:
                own = records | own  # of two headers for one member, tarfile believes the first
            continue
        name = facts.get(SPARSE_NAME) or facts.get("path") or header.name
        if header.type in LINKS:
            yield Link(name)
        elif header.isreg():
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or SPARSE in facts
            yield Member(name, content, stored, is_sparse)
        own = {}
    if not ended:
        file.seek(0)
        what = kind_of(file.read(HEAD)) if offset == 0 else ""
        cause = f"is {what}" if what else "no end mark, was cut short"
        yield Damage("truncated", offset, cause if size else "is empty: 0 bytes")


def _after_zeros(file: BinaryIO, offset: int, size: int) -> int:
    """Where the first block is that holds anything; a hole of gigabytes is passed in megabytes."""
    while offset + BLOCK <= size:
        file.seek(offset)
        chunk = file.read(ZEROS)
        if chunk != bytes(len(chunk)) or len(chunk) < BLOCK:
            return offset + (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK
        offset += len(chunk) // BLOCK * BLOCK
    return offset


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


def _stored_size(header: tarfile.TarInfo, facts: dict[str, str]) -> int:
    """The bytes that a member takes in the tar. Raises ValueError for a size that is none."""
    if header.type in WITHOUT_CONTENT:
        return 0  # whatever it says: a link cannot hide the members behind it
    said = facts.get("size", "")
    if said and not (said.isascii() and said.isdigit() and len(said) < 20):
        raise ValueError("a pax size that is no number")
    size = int(said) if said else header.size
    if size < 0:
        raise ValueError("negative size")
    return size


def _sparse_maps(file: BinaryIO, offset: int, size: int) -> int:
    """The bytes between an old GNU sparse header and its content: further blocks of its map, each saying if one more
    follows. Of a file cut short, more than are there."""
    file.seek(offset + 482)
    more, length = file.read(1), 0
    while more not in (b"", b"\0") and offset + length < size:
        length += BLOCK
        file.seek(offset + length + 504)
        more = file.read(1)
    return length


def _records(file: BinaryIO, offset: int, header: tarfile.TarInfo) -> dict[str, str] | None:
    """What a GNU long-name or pax header says of the next member, by pax's keywords; None if it cannot be read."""
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    is_pax = header.type != tarfile.GNUTYPE_LONGNAME
    if header.size > (MAX_PAX_BYTES if is_pax else MAX_NAME_BYTES):
        return None
    file.seek(offset)
    content = file.read(header.size)
    if not is_pax:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    records: dict[str, str] = {}
    place = 0
    while place < len(content):
        space = content.find(b" ", place, place + 20)
        length = content[place:space]
        if space < 0 or not length.isdigit() or not space - place + 1 < int(length) <= len(content) - place:
            return None
        keyword, equals, value = content[space + 1 : place + int(length) - 1].partition(b"=")
        place += int(length)
        key = keyword.decode("utf-8", "surrogateescape")
        if equals and key in ("path", "size", SPARSE_NAME):
            records[key] = value.decode("utf-8", "surrogateescape")
        elif equals and key.startswith("GNU.sparse."):
            records[SPARSE] = "yes"
    longest = MAX_SHARED_NAME if header.type == tarfile.XGLTYPE else MAX_NAME_BYTES
    return None if any(len(value) > longest for value in records.values()) else records


def _next_header(file: BinaryIO, offset: int, size: int) -> int:
    """The first offset from here on with a valid header; the end of the file if there is none."""
    while offset + BLOCK <= size:
        file.seek(offset)
        chunk = file.read(1 << 20)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar" or _may_be_v7(chunk[start : start + BLOCK]):
                try:
                    tarfile.TarInfo.frombuf(chunk[start : start + BLOCK], "utf-8", "surrogateescape")
                    return offset + start
                except tarfile.HeaderError:
                    continue
        offset += max(BLOCK, len(chunk) // BLOCK * BLOCK)
    return size


def _may_be_v7(block: bytes) -> bool:
    """Whether a block has the empty end of a header from before ustar."""
    return block[0] != 0 and not any(block[257:])
