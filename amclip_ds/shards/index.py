"""The index of a set of shards: where each sample's members are, and what its image header says. One pass makes it.

A folder of four files: `meta.json` (version, shards with size, mtime, fingerprint, counts and damage), `samples.bin`
(34 bytes a sample, read by memory map), `keys.bin`, and `content.bin` with the checksums of each sample's members
(contents.py), by which a shard that changed is noticed, regardless of its size and time (changes.py).
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from amclip_ds.errors import NotRead, UserError
from amclip_ds.files import not_read, not_written, open_regular, read_json, sync, write_atomically
from amclip_ds.images import header_size
from amclip_ds.processes import WorkerCrashed, map_in_processes
from amclip_ds.redact import redact
from amclip_ds.shards import reader
from amclip_ds.shards.contents import CONTENT, checksum_in, digest
from amclip_ds.shards.grouping import IMAGE_TYPES, MAX_IMAGE_BYTES, Group, group, left_out_name
from amclip_ds.shards.inputs import check_index_folder, is_of_index
from amclip_ds.shards.kinds import IMAGES
from amclip_ds.shards.sources import MAX_SHARDS, is_remote
from amclip_ds.shards.tar import BLOCK, Damage, Member, scan

VERSION = 1
MAX_META = MAX_SHARDS << 10  # bytes
ENTRY = 512  # bytes of meta.json that a shard takes beside its path: 220, and what is wrong with it
RECORD = np.dtype(
    [
        ("image_block", "<u4"),
        ("image_size", "<u4"),
        ("text_block", "<u4"),
        ("text_size", "<u4"),
        ("json_block", "<u4"),
        ("json_size", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("format", "u1"),
        ("flags", "u1"),
        ("key_offset", "<u4"),
    ]
)
HAS_TEXT, HAS_JSON, BAD_HEADER = 1, 2, 4
LEFT_BEHIND_S = 86400.0
HEADER_BYTES = 1 << 16  # an image's header with its EXIF block
LONG_HEADER_BYTES = 1 << 22  # one that carries a colour profile of a printer, or a preview


@dataclass
class ShardEntry:
    """What the pass found in one shard."""

    path: str
    """without the secrets of a URL"""
    size: int
    mtime_ns: int
    fingerprint: str
    samples: int
    """records, in the shard's order"""
    problems: list[dict[str, Any]] = field(default_factory=list)
    """{kind, key, count}: members and samples that cannot be trained on"""
    key_bytes: int = 0
    contents: str = ""
    """a hash of what all members of its samples hold"""
    etag: str = ""
    """of a remote shard: what its server calls this content, where it is exact about it"""


class Scanned(NamedTuple):
    """What one pass over a shard found: its entry, and its rows of samples.bin, keys.bin and content.bin."""

    entry: ShardEntry
    records: bytes
    keys: bytes
    contents: bytes


@dataclass(frozen=True)
class Sample:
    """Where one sample is."""

    sample_id: int
    shard: str
    key: str
    image: tuple[int, int]
    """(offset, size)"""
    text: tuple[int, int] | None
    json: tuple[int, int] | None
    checksums: tuple[int, ...] | None = None
    """of image, text and json as they were indexed; None from an index that did not note them"""


class Index:
    """An opened index: memory-mapped, shared by all processes of a node through the page cache."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        try:
            meta = read_json(folder / "meta.json", dict, MAX_META)
        except NotRead as error:
            raise NotRead(f"data.index: {error}") from None
        except UserError as error:
            raise UserError(f"data.index: {folder} holds no index ({error}); make it: amclip data index") from None
        if meta.get("version") != VERSION:
            reported = str(meta.get("version"))[:20]
            raise UserError(f"data.index: {folder} has format {reported}, this is {VERSION}; make it again")
        self.shards = _entries_of(folder, meta)
        self.records = _map(folder / "samples.bin", RECORD)
        self.counts = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._keys = _map(folder / "keys.bin", np.dtype(np.uint8))
        self._key_starts = np.concatenate([[0], np.cumsum([shard.key_bytes for shard in self.shards])]).astype(np.int64)
        if not len(self.records) == meta.get("samples") == self.starts[-1] or len(self._keys) != self._key_starts[-1]:
            raise UserError(f"data.index: {folder}/samples.bin is cut short; make it again: amclip data index")
        self.contents = _map(folder / "content.bin", CONTENT) if (folder / "content.bin").exists() else None
        if self.contents is not None and len(self.contents) != len(self.records):
            raise UserError(f"data.index: {folder}/content.bin is cut short; make it again: amclip data index")

    def __len__(self) -> int:
        return len(self.records)

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that holds a sample."""
        return int(self.starts.searchsorted(sample_id, side="right")) - 1

    def sample(self, sample_id: int) -> Sample:
        """Where a sample is. sample_id: 0 .. len - 1, shards in the index's order."""
        record = dict(zip(RECORD.names or (), self.records[sample_id].item()))
        shard = self.shard_of(sample_id)

        def place(name: str) -> tuple[int, int]:
            return record[f"{name}_block"] * BLOCK, record[f"{name}_size"]

        return Sample(
            sample_id,
            self.shards[shard].path,
            self._key(sample_id, shard),
            place("image"),
            place("text") if record["flags"] & HAS_TEXT else None,
            place("json") if record["flags"] & HAS_JSON else None,
            None if self.contents is None else self.contents[sample_id].item(),
        )

    def key(self, sample_id: int) -> str:
        """A sample's key: its members' common name."""
        return self._key(sample_id, self.shard_of(sample_id))

    def keys(self, shard: int) -> Iterator[str]:
        """The keys of a shard's samples, in order, many times faster than one by one."""
        begin, end = int(self._key_starts[shard]), int(self._key_starts[shard + 1])
        block = self._keys[begin:end].tobytes()
        starts = self.records["key_offset"][int(self.starts[shard]) : int(self.starts[shard + 1])].tolist()
        for start, stop in zip(starts, [*starts[1:], end - begin]):
            yield block[start:stop].decode("utf-8", "surrogateescape")

    def _key(self, sample_id: int, shard: int) -> str:
        offsets = self.records["key_offset"]
        begin, end = int(self._key_starts[shard]), int(self._key_starts[shard + 1])
        stop = end if sample_id + 1 == self.starts[shard + 1] else begin + int(offsets[sample_id + 1])
        return self._keys[begin + int(offsets[sample_id]) : stop].tobytes().decode("utf-8", "surrogateescape")

    def find(self, shards: list[str]) -> list[int]:
        """Each shard's number in the index: by its path, else by a name that is there once. Raises UserError."""
        by_path = {redact(shard.path): number for number, shard in enumerate(self.shards)}
        by_name: dict[str, list[int]] = {}
        for number, shard in enumerate(self.shards):
            by_name.setdefault(Path(redact(shard.path)).name, []).append(number)
        found = []
        for path in map(redact, shards):
            alike = by_name.get(Path(path).name, [])
            if path not in by_path and len(alike) != 1:
                raise UserError(f"data.index: {self.folder} does not hold {path}; make it again: amclip data index")
            found.append(by_path.get(path, alike[0] if alike else -1))
        return found

    def bytes_of(self, first: int, last: int) -> tuple[int, int]:
        """(start, stop) in its shard of what the samples first .. last (ids, of one shard) hold, about."""
        start, stop = self.records[first], self.records[last]
        ends = [int(stop[f"{name}_block"]) * BLOCK + int(stop[f"{name}_size"]) for name in ("image", "text", "json")]
        return int(start["image_block"]) * BLOCK, max(ends)

    def fingerprint(self) -> str:
        """A hash of what the samples are: equal for equal data, wherever it is."""
        digest = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            name = Path(redact(shard.path)).name
            digest.update(f"{name} {shard.size} {shard.fingerprint} {shard.samples}\n".encode())
        return digest.hexdigest()

    def contents_fingerprint(self) -> str:
        """A hash of what all members hold; empty from an index that did not note it."""
        if self.contents is None or not all(shard.contents for shard in self.shards):
            return ""
        return hashlib.blake2b("\n".join(s.contents for s in self.shards).encode(), digest_size=16).hexdigest()

    def note_times(self, entries: dict[int, ShardEntry]) -> None:
        """Takes over size, time and ETag of shards whose content was found to be the same, so that they need not be
        checked again; in the file too, where it can be written."""
        for number, entry in entries.items():
            self.shards[number] = replace(
                self.shards[number], mtime_ns=entry.mtime_ns, etag=entry.etag or self.shards[number].etag
            )
        with contextlib.suppress(OSError):
            write_atomically(self.folder / "meta.json", _meta_of(self.shards))


def build_index(
    shards: list[str],
    folder: Path,
    workers: int,
    on_shard: Callable[[ShardEntry], None] = lambda entry: None,
    key: str = "data.index",
) -> Index:
    """Indexes the shards in parallel and writes the folder, which appears whole by one rename. Reports each shard.

    key: the setting or option that named the folder. Raises UserError for a folder that holds anything but an index
    and, before any work, for an index that nobody could read; AmclipError where the disk is full.
    """
    if sum(len(json.dumps(shard)) + ENTRY for shard in shards) > MAX_META:
        raise UserError(
            f"{key}: {len(shards)} shards of such long paths take more than the {MAX_META} bytes that an index's"
            " meta.json may have; pack them larger, or give them shorter paths"
        )
    check_index_folder(folder, key)
    _remove_left_behind(folder)
    partial = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise not_written(f"{key}: {folder}", error) from None
    entries = []
    try:
        with (
            (partial / "samples.bin").open("wb") as samples,
            (partial / "keys.bin").open("wb") as keys,
            (partial / "content.bin").open("wb") as contents_file,
        ):
            for scanned in _scanned(shards, workers):
                samples.write(scanned.records)
                keys.write(scanned.keys)
                contents_file.write(scanned.contents)
                entries.append(scanned.entry)
                on_shard(scanned.entry)
        (partial / "meta.json").write_text(_meta_of(entries))
        _replace(partial, folder)
    except OSError as error:
        raise not_written(f"{key}: {folder}", error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Index(folder)


def _remove_left_behind(folder: Path) -> None:
    """What processes of this user that are gone left of their building this index: of this host by their number, of
    others after a day without a change."""
    begin, end = f".{folder.name}.", ".partial"
    for path in folder.parent.glob(f".*{end}"):
        if not path.name.startswith(begin):
            continue
        host, _, number = path.name.removeprefix(begin).removesuffix(end).rpartition(".")
        try:
            if path.stat().st_uid != os.getuid():  # whose processes may be hidden from us
                continue
            newest = max(file.stat().st_mtime for file in (path, *path.iterdir()))
        except OSError:  # its process has just removed or renamed it
            continue
        is_ours = number == str(os.getpid())
        is_gone = host == os.uname().nodename and (is_ours or not _is_alive(number))
        if is_gone or time.time() - newest > LEFT_BEHIND_S:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # another user's, or a name that is none of ours
        pass
    return True


def _meta_of(entries: list[ShardEntry]) -> str:
    total = sum(entry.samples for entry in entries)
    return json.dumps({"version": VERSION, "samples": total, "shards": [asdict(entry) for entry in entries]})


def _replace(partial: Path, folder: Path) -> None:
    """Puts the new index in the old one's place, durably; where another process was faster, its index stays. Of the old
    one only the index's own files go, and of a link the link alone."""
    for path in (*partial.iterdir(), partial):
        sync(path)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    try:
        partial.rename(folder)
        sync(folder.parent)
    except OSError:
        if not (folder / "meta.json").exists():
            raise
    with contextlib.suppress(OSError):
        if old.is_symlink():
            old.unlink()
        else:
            for path in filter(lambda path: is_of_index(path.name), list(old.iterdir())):
                path.unlink()
            old.rmdir()


def _scanned(shards: list[str], workers: int) -> Iterator[Scanned]:
    for shard, found in zip(shards, map_in_processes(scan_shard, shards, workers), strict=True):
        if isinstance(found, WorkerCrashed):
            yield _unreadable(shard, str(found))
        else:
            yield found


def scan_shard(shard: str) -> Scanned:
    """One pass over a shard. One that cannot be read becomes an entry with a problem. Raises AmclipError where the file
    system fails for minutes."""

    def scanned() -> Scanned:
        with reader.open_shard(shard) as opened:
            return _scan_open_shard(shard, opened)

    try:
        return reader.outlasting(shard, scanned)
    except OSError as error:
        return _unreadable(shard, error.strerror or str(error))


def _unreadable(shard: str, cause: str) -> Scanned:
    problem = {"kind": "unreadable", "key": cause, "count": 1}
    return Scanned(ShardEntry(redact(shard), 0, 0, "", 0, [problem]), b"", b"", b"")


def _scan_open_shard(shard: str, opened: reader.Opened) -> Scanned:
    file, size, mtime_ns, etag = opened
    found = _Found()
    for item in group(scan(file, size)):
        if isinstance(item, Damage):
            found.problem(item.kind, str(item))
        elif isinstance(item, Group):
            found.enter(file, item)
        elif kind := left_out_name(item):
            found.problem(kind, item.name)
    found.name_the_incomplete()
    listed = [{"kind": kind, "key": key, "count": count} for kind, (key, count) in found.problems.items()]
    keys = b"".join(found.keys)
    checksums = np.array(found.checksums, dtype=CONTENT).tobytes()
    entry = ShardEntry(
        redact(shard),
        size,
        mtime_ns,
        fingerprint(file, size),
        len(found.rows),
        listed,
        len(keys),
        digest(checksums),
        etag,
    )
    return Scanned(entry, np.array(found.rows, dtype=RECORD).tobytes(), keys, checksums)


class _Found:
    """What one pass over a shard has found so far."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.keys: list[bytes] = []
        self.checksums: list[tuple[int, ...]] = []
        self.problems: dict[str, tuple[str, int]] = {}
        """kind -> (key of the first, count)"""
        self._key_bytes = 0
        self._without_image: list[str] = []
        self._without_caption: list[str] = []

    def problem(self, kind: str, key: str, count: int = 1) -> None:
        first, before = self.problems.get(kind, (key, 0))
        self.problems[kind] = (first, before + count)

    def enter(self, file: BinaryIO, one: Group) -> None:
        images = one.images()
        if not images:
            if unread := one.of_types(*IMAGES):
                self.problem("unread type", unread[0][1].name)
            else:
                self._without_image.append(one.key)
            return
        if len(images) > 1:
            self.problem("surplus image", images[1][1].name, len(images) - 1)
        if why := one.unreadable():
            self.problem(why, one.key)
            return
        row = _record(file, self._key_bytes, one)
        if row is None:
            self.problem("too far", one.key)
            return
        self.rows.append(row)
        members = images[0][1], one.member("txt"), one.member("json")
        self.checksums.append(tuple(checksum_in(file, member) for member in members))
        self.keys.append(one.key.encode("utf-8", "surrogateescape"))
        self._key_bytes += len(self.keys[-1])
        if not row["flags"] & (HAS_TEXT | HAS_JSON):
            self._without_caption.append(one.key)

    def name_the_incomplete(self) -> None:
        """Once all members are known: what lacks an image or a caption, and what is only not adjacent to it."""
        elsewhere = set(self._without_image)
        if elsewhere:
            elsewhere &= {key.decode("utf-8", "surrogateescape") for key in self.keys}
        for key in self._without_image:
            if key not in elsewhere:
                self.problem("no image", key)
        for key in self._without_caption:
            self.problem("not adjacent" if key in elsewhere else "no caption", key)


def _record(file: BinaryIO, key_offset: int, one: Group) -> Any:
    """One row of samples.bin; None for a member beyond 2 TiB, which 32-bit block numbers cannot name."""
    kind, image = one.images()[0]
    text, fields = one.member("txt"), one.member("json")
    if any(m.offset // BLOCK >= 1 << 32 or m.size >= 1 << 32 for m in (image, text, fields) if m):
        return None
    width, height = image_size(file, image)
    flags = (HAS_TEXT if text else 0) | (HAS_JSON if fields else 0) | (BAD_HEADER if width == 0 else 0)
    row = np.zeros((), dtype=RECORD)
    for name, member in (("image", image), ("text", text), ("json", fields)):
        if member:
            row[f"{name}_block"], row[f"{name}_size"] = member.offset // BLOCK, member.size
    row["width"], row["height"], row["flags"] = min(width, 65535), min(height, 65535), flags
    row["format"], row["key_offset"] = IMAGE_TYPES[kind], key_offset
    return row


def image_size(file: BinaryIO, member: Member) -> tuple[int, int]:
    """(width, height) from the image's header; (0, 0) where it cannot be read. Nothing is decoded."""
    for limit in (HEADER_BYTES, LONG_HEADER_BYTES, MAX_IMAGE_BYTES):
        file.seek(member.offset)
        size = header_size(file.read(min(member.size, limit)))
        if 0 not in size or member.size <= limit:
            return (0, 0) if 0 in size else size
    return (0, 0)


def fingerprint(file: BinaryIO, size: int) -> str:
    """A hash of a shard's size, first and last 64 KiB."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    for start in (0, max(0, size - HEADER_BYTES)):
        file.seek(start)
        digest.update(file.read(HEADER_BYTES))
    return digest.hexdigest()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file by memory map; an empty one, which cannot be mapped, as an empty array. Raises UserError."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, dtype)
            return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)  # each part of a memmap costs microseconds
    except OSError as error:
        failure = not_read(f"data.index: {path}", error)
        again = "" if isinstance(failure, NotRead) else "; make it again: amclip data index"
        raise type(failure)(f"{failure}{again}") from None
    except ValueError:  # no whole number of records
        raise UserError(f"data.index: {path} is cut short; make it again: amclip data index") from None


def _entries_of(folder: Path, meta: dict[str, Any]) -> list[ShardEntry]:
    """The shards that meta.json lists, each field of its type. Raises UserError."""
    try:
        entries = [ShardEntry(**entry) for entry in meta["shards"]]
        for entry in entries:
            counts = entry.size, entry.samples, entry.key_bytes
            is_typed = all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
            is_typed = is_typed and type(entry.mtime_ns) is int
            is_typed = is_typed and isinstance(entry.contents, str) and isinstance(entry.etag, str)
            if not is_typed or not isinstance(entry.path, str) or not isinstance(entry.fingerprint, str):
                raise TypeError("a field of another type")
            if not all(
                isinstance(p, dict)
                and type(p.get("count")) is int
                and isinstance(p.get("kind"), str)
                and isinstance(p.get("key"), str)
                for p in entry.problems
            ):
                raise TypeError("a problem without kind, key and count")
        return entries
    except (KeyError, TypeError) as error:
        raise UserError(f"data.index: {folder}/meta.json: no list of shards ({error}); make it again") from None


def fingerprint_of(path: str) -> str:
    with open(path, "rb") as file:
        return fingerprint(file, os.fstat(file.fileno()).st_size)


@functools.cache
def default_folder(shards: tuple[str, ...]) -> Path:
    """Where the index of these shards is expected: beside the first one, or in the working folder for remote ones.

    Its name is of where they are from there, however their folder was typed, so that a run finds it under another
    spelling, and after the folder has moved.
    """
    if is_remote(shards[0]):
        return Path(name_of(shards))
    folder = Path(shards[0]).parent
    here = os.path.realpath(folder)
    folders = dict.fromkeys(os.path.dirname(path) for path in shards if not is_remote(path))
    from_here = {typed: os.path.relpath(os.path.realpath(typed), here) for typed in folders}
    places = (path if is_remote(path) else from_here[os.path.dirname(path)] for path in shards)
    return folder / name_of(tuple(f"{place}/{os.path.basename(path)}" for place, path in zip(places, shards)))


def name_of(shards: tuple[str, ...]) -> str:
    """An index's folder by the paths of its shards; indexes of earlier versions have that of the paths as typed."""
    return f"amclip-index-{hashlib.blake2b(repr(tuple(map(redact, shards))).encode(), digest_size=6).hexdigest()}"
