"""Which shards are no longer what was indexed: suspected by size, time or ETag, confirmed by content.

A shard whose time alone is new (touched, copied, uploaded again) is scanned once more, and stays what it was if the
checksums of all members are equal. One that differs is named with the first sample that does.
"""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from amclip_ds.files import NOTHING_THERE, not_read
from amclip_ds.processes import WorkerCrashed, map_in_processes
from amclip_ds.redact import redact
from amclip_ds.shards import contents
from amclip_ds.shards.index import CONTENT, RECORD, Index, Scanned, ShardEntry, fingerprint_of, scan_shard
from amclip_ds.shards.reader import identity_of, outlasting
from amclip_ds.shards.sources import is_remote
from amclip_ds.shards.tar import printable

GONE, CHANGED = "gone", "changed since it was indexed"
AT_ONCE = 32  # remote shards asked after together


class Changed(NamedTuple):
    """A shard that is not what was indexed."""

    path: str
    what: str
    """`gone`, or `changed since it was indexed`"""
    detail: str = ""
    """what differs first"""


def changed_shards(
    index: Index, paths: list[str], numbers: list[int], processes: int, on_shard: Callable[[], None] = lambda: None
) -> list[Changed]:
    """What has changed in the shards of these numbers, that are at these paths now. on_shard: called after each that
    had to be read. Raises AmclipError where the file system fails for minutes, UserError for a shard that is there and
    cannot be read."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        doubts = list(pool.map(lambda of: _doubt(index, *of), zip(paths, numbers)))
    found = [Changed(redact(path), doubt) for path, doubt in zip(paths, doubts) if doubt == GONE]
    suspects = [(path, number) for path, number, doubt in zip(paths, numbers, doubts) if doubt not in ("", GONE)]
    scanned = map_in_processes(scan_shard, [path for path, _ in suspects], processes)
    unchanged = {}
    for (path, number), scan in zip(suspects, scanned, strict=True):
        on_shard()
        if isinstance(scan, WorkerCrashed):
            found.append(Changed(redact(path), CHANGED, f"cannot be read: {scan}"))
        elif (difference := _difference(index, number, scan)) is not None:
            found.append(Changed(redact(path), CHANGED, difference))
        elif path == index.shards[number].path:
            unchanged[number] = scan.entry
    if unchanged:
        index.note_times(unchanged)
    return found


def _doubt(index: Index, path: str, number: int) -> str:
    """Why a shard may have changed, by what can be known without reading it; empty where nothing speaks for it.

    Of one that is elsewhere than it was indexed the fingerprint counts, not the time. Raises as `changed_shards` does.
    """
    shard = index.shards[number]
    if is_remote(path):
        size, etag = identity_of(path)
        is_same = size in (-1, shard.size) and (not etag or not shard.etag or etag == shard.etag)
        return "" if is_same else "another ETag or size"
    try:
        return outlasting(path, lambda: _doubt_of_file(shard, path))
    except OSError as error:
        if error.errno in NOTHING_THERE:
            return GONE
        raise not_read(f"data.train: {path}", error) from None


def _doubt_of_file(shard: ShardEntry, path: str) -> str:
    now = os.stat(path)
    if path == shard.path:
        is_same = now.st_mtime_ns == shard.mtime_ns
    else:
        is_same = fingerprint_of(path) == shard.fingerprint
    return "" if is_same and now.st_size == shard.size else "another time or size"


def _difference(index: Index, number: int, scanned: Scanned) -> str | None:
    """How a shard differs from what was indexed of it; None if every sample is the same, byte for byte."""
    before, now = index.shards[number], scanned.entry
    with contextlib.suppress(StopIteration):
        problem = next(problem for problem in now.problems if problem["kind"] == "unreadable")
        return f"cannot be read: {problem['key']}"
    if index.contents is None:
        return ""
    first, last = int(index.starts[number]), int(index.starts[number + 1])
    rows, checksums = np.frombuffer(scanned.records, RECORD), np.frombuffer(scanned.contents, CONTENT)
    common = min(last - first, now.samples)
    row, member = contents.first_difference(index.contents[first : first + common], checksums[:common])
    if row >= 0:
        key = printable(index.key(first + row))
        return f"the {member} of {key} is another"
    if now.samples != before.samples:
        return f"{now.samples} samples now, {before.samples} when it was indexed"
    if now.size != before.size or not np.array_equal(rows, index.records[first:last]):
        return f"{now.size} bytes now, {before.size} when it was indexed"
    return None
