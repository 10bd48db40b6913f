"""Reads members of shards by offset: local files by pread, remote ones by ranges, with retry and back-off."""

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

from amclip_ds import files
from amclip_ds.files import OF_THE_MACHINE
from amclip_ds.redact import redact
from amclip_ds.shards.sources import is_remote, scheme_of
from amclip_ds.shards.stage import Stage

T = TypeVar("T")
Request = tuple[str, int, int]
"""(shard, offset, size) of a member's content"""
MAX_OPEN = 64
ATTEMPTS, FIRST_PAUSE_S = 6, 0.2
LOCAL_ATTEMPTS = 3
SILENCE_S = 60.0  # without a byte from a server
GAP = 1 << 18  # members closer than this are read in one go: a skipped 256 KiB costs less than another request


class Refused(OSError):
    """An answer that another request would only repeat."""


class ShardChanged(OSError):
    """A shard that is another than was indexed."""


class Opened(NamedTuple):
    """A shard that can be passed over once."""

    file: BinaryIO
    size: int
    mtime_ns: int
    """0 for a remote one"""
    etag: str
    """what a remote one's server calls this content, where it is exact about it"""


class ShardReader:
    """Opened shards, most recently used kept. One per process.

    stage_dir: a node-local folder that shards are copied to before they are read, up to stage_bytes.
    on_retry: called with (shard, cause) for every request that had to be repeated.
    sizes: of shards as they were indexed: one that is of another size now is reported as changed, not as unreadable.
    """

    def __init__(
        self,
        stage_dir: str | None = None,
        stage_bytes: int = 0,
        on_retry: Callable[[str, str], None] | None = None,
        sizes: Mapping[str, int] = {},
    ) -> None:
        self._sizes = sizes
        self._files: OrderedDict[str, int] = OrderedDict()
        self._systems: dict[str, Any] = {}
        self._without_ranges: set[str] = set()
        self._stage = Stage(stage_dir, stage_bytes) if stage_dir else None
        self._on_retry = on_retry or (lambda shard, cause: None)

    def read(self, requests: Iterable[Request]) -> dict[Request, bytes | OSError]:
        """The content at each place, or the error that reading it ended in. Neighbours are read together, shards from
        front to back; the ranges of a remote shard are asked for at the same time."""
        by_shard: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for shard, offset, size in requests:
            by_shard[shard].add((offset, size))
        contents: dict[Request, bytes | OSError] = {}
        for shard, places in by_shard.items():
            blocks = list(_together(places))
            spans = [(start, stop) for start, stop, _ in blocks]
            answers = self._read_remote(shard, spans) if is_remote(shard) else self._read_local(shard, spans)
            for (start, _, inside), block in zip(blocks, answers):
                for offset, size in inside:
                    whole = block if isinstance(block, OSError) else block[offset - start : offset - start + size]
                    contents[(shard, offset, size)] = whole
        return contents

    def read_many(self, shard: str, places: list[tuple[int, int]]) -> list[bytes]:
        """The contents at (offset, size) of one shard, in the order asked. Raises OSError."""
        contents = self.read((shard, *place) for place in places)
        found = []
        for place in places:
            content = contents[(shard, *place)]
            if isinstance(content, OSError):
                raise content
            found.append(content)
        return found

    def read_afresh(self, shard: str, places: Sequence[tuple[int, int] | None]) -> list[bytes | None]:
        """The contents at these places of the shard itself, opened anew; its copy is dropped. Raises OSError."""
        if shard in self._files:
            os.close(self._files.pop(shard))
        if self._stage and not is_remote(shard):
            self._stage.drop(shard)
            self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        found = iter(self.read_many(shard, [place for place in places if place]))
        return [next(found) if place else None for place in places]

    def will_need(self, shard: str, start: int, stop: int) -> None:
        """Asks the kernel to read a range ahead, in large sequential reads; nothing for a remote shard."""
        if not is_remote(shard) and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file(shard), start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes every shard."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_local(self, shard: str, spans: list[tuple[int, int]]) -> list[bytes | OSError]:
        return [self._pread(shard, start, stop - start) for start, stop in spans]

    def _pread(self, shard: str, offset: int, size: int) -> bytes | OSError:
        for attempt in range(LOCAL_ATTEMPTS):
            try:
                content = os.pread(self._file(shard), size, offset)
                if len(content) == size:
                    return content
                changed = self._other_size(shard, os.fstat(self._file(shard)).st_size)
                return changed or OSError(f"{len(content)} of {size} bytes came")
            except OSError as error:
                if error.errno not in OF_THE_MACHINE or attempt + 1 == LOCAL_ATTEMPTS:
                    return error
                self._on_retry(shard, f"{error}")
                if shard in self._files:
                    os.close(self._files.pop(shard))
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    def _read_remote(self, shard: str, spans: list[tuple[int, int]]) -> list[bytes | OSError]:
        """All ranges at once; those that fail are repeated one by one."""
        system = self._remote(shard)
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
        try:
            answers = system.cat_ranges([shard] * len(spans), starts, stops, on_error="return")
        except Exception as error:  # fsspec's back ends raise their own kinds: any of them may be a moment's failure
            answers = [error] * len(spans)
        if shard in system.whole and shard not in self._without_ranges:
            self._without_ranges.add(shard)
            self._on_retry(shard, "the server ignores ranges: it sends the whole shard for each read")
        if changed := self._other_size(shard, system.facts.get(shard, (-1, ""))[0]):
            return [changed] * len(spans)
        return [
            content
            if isinstance(content, bytes) and len(content) == stop - start
            else self._read_again(shard, start, stop, content)
            for content, (start, stop) in zip(answers, spans)
        ]

    def _read_again(self, shard: str, start: int, stop: int, first: Any) -> bytes | OSError:
        if isinstance(first, Refused):
            return first
        said = f"{len(first)} of {stop - start} bytes came" if isinstance(first, bytes) else _cause_of(first)
        self._on_retry(shard, said)
        system = self._remote(shard)

        def request() -> bytes:
            content = system.cat_file(shard, start=start, end=stop)
            if len(content) != stop - start:
                raise OSError(f"{len(content)} of {stop - start} bytes came")
            return content

        time.sleep(FIRST_PAUSE_S * (1 + random.random()))
        try:
            return retry(request, lambda cause: self._on_retry(shard, cause), ATTEMPTS - 1)
        except OSError as error:
            return error

    def _other_size(self, shard: str, size: int) -> "ShardChanged | None":
        """The error of a shard that is not as long as when it was indexed; None where it is, or nobody knows."""
        indexed = self._sizes.get(shard, size)
        if size in (-1, indexed):
            return None
        return ShardChanged(f"has {size} bytes now, {indexed} when it was indexed")

    def _remote(self, shard: str) -> Any:
        scheme = scheme_of(shard)
        if scheme not in self._systems:
            from amclip_ds.shards.remote import open_system

            self._systems[scheme] = open_system(shard, SILENCE_S)
        return self._systems[scheme]

    def _file(self, shard: str) -> int:
        if shard not in self._files:
            copy = self._stage.open(shard) if self._stage else None
            self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC) if copy is None else copy
            if len(self._files) > MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


def _cause_of(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")


def retry(request: Callable[[], T], on_failure: Callable[[str], None], attempts: int = ATTEMPTS) -> T:
    """Repeats a remote request with growing pauses. Raises OSError, with the last cause, when it never succeeds."""
    for attempt in range(attempts):
        try:
            return request()
        except Refused:
            raise
        except Exception as error:  # fsspec's back ends raise their own kinds: any of them may be a moment's failure
            cause = _cause_of(error)
            on_failure(cause)
            if attempt + 1 == attempts:
                raise OSError(f"{cause} ({attempts} attempts)") from error
            time.sleep(FIRST_PAUSE_S * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


def outlasting(shard: str, request: Callable[[], T]) -> T:
    """files.outlasting for what reads a shard."""
    return files.outlasting(f"data.train: {redact(shard)}", request)


@contextlib.contextmanager
def open_shard(shard: str) -> Iterator[Opened]:
    """A shard for one pass over it; a remote one is fetched to a temporary file first."""
    if not is_remote(shard):
        with open(shard, "rb", buffering=1 << 20) as file:
            stat = os.fstat(file.fileno())
            yield Opened(file, stat.st_size, stat.st_mtime_ns, "")
        return
    with tempfile.TemporaryFile() as file:
        etag = ""
        if shard.startswith("pipe:"):
            done = subprocess.run(shard.removeprefix("pipe:"), shell=True, stdout=file, check=False)
            if done.returncode:
                raise OSError(f"the command ended with {done.returncode}")
        else:
            etag = retry(lambda: _download(shard, file), lambda cause: None)
        yield Opened(file, file.seek(0, os.SEEK_END), 0, etag)


def _download(url: str, file: Any) -> str:
    """Writes a remote shard to a file from its start. Returns its ETag."""
    from amclip_ds.shards.remote import open_system

    file.seek(0)
    file.truncate()
    return open_system(url, SILENCE_S).download(url, file)[1]


def identity_of(url: str) -> tuple[int, str]:
    """(size, ETag) of a remote shard as its server gives them; (-1, "") where it does not, or does not answer."""
    from amclip_ds.shards.remote import open_system

    try:
        found = retry(lambda: open_system(url, SILENCE_S).info(url), lambda cause: None, attempts=2)
        return int(found["size"]), str(found["ETag"])
    except OSError:
        return -1, ""


def _together(places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """(start, stop, places inside) of the requests that read all places."""
    start = stop = -1
    inside: list[tuple[int, int]] = []
    for offset, size in sorted(set(places)):
        if inside and offset - stop > GAP:
            yield start, stop, inside
            inside = []
        if not inside:
            start, stop = offset, offset
        stop = max(stop, offset + size)
        inside.append((offset, size))
    if inside:
        yield start, stop, inside
