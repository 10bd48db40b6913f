"""What the members of samples hold, as a checksum each: noted by the index, compared wherever a member is read again.

Size and time say that a file may have changed; only its content says that it has. Indexing passes over every byte of a
shard whose members are of ordinary size anyhow, so that a checksum (CRC-32, about 2 GB/s) costs little there, 12 bytes
a sample on disk, and 25 microseconds for an image of 50 kB in training.
"""

import hashlib
import zlib
from typing import BinaryIO

import numpy as np

from amclip_ds.shards.tar import Member

MEMBERS = ("image", "text", "json")
CONTENT = np.dtype([(name, "<u4") for name in MEMBERS])
"""a row a sample, in the order of the index; 0 for a member that it has not"""
PIECE = 1 << 20


def checksum(content: bytes) -> int:
    """Of a member's content; never 0."""
    return zlib.crc32(content) or 1


def checksum_in(file: BinaryIO, member: Member | None) -> int:
    """Of a member of an opened tar; 0 if there is none."""
    if member is None:
        return 0
    file.seek(member.offset)
    left, crc = member.size, 0
    while left and (piece := file.read(min(PIECE, left))):
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc or 1


def digest(rows: bytes) -> str:
    """Of all members of a shard's samples."""
    return hashlib.blake2b(rows, digest_size=8).hexdigest()


def first_difference(before: np.ndarray, now: np.ndarray) -> tuple[int, str]:
    """(row, member) where two tables of checksums of equal length first differ; (-1, "") where they are equal."""
    rows = np.flatnonzero(before != now)
    if not len(rows):
        return -1, ""
    row = int(rows[0])
    return row, next(name for name in MEMBERS if before[row][name] != now[row][name])
