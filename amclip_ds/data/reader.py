"""Reads members of shards by offset: local files by pread, remote ones by ranges, with retry and back-off."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

from amclip_ds.data.sources import is_remote
from amclip_ds.data.stage import Stage
from amclip_ds.redact import redact

T = TypeVar("T")
Request = tuple[str, int, int]
"""(shard, offset, size) of a member's content"""
MAX_OPEN = 64
ATTEMPTS, FIRST_PAUSE_S = 6, 0.2
LOCAL_ATTEMPTS = 3
SILENCE_S = 60.0  # without a byte from a server
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)  # what a network file system says in a bad moment
GAP = 1 << 18  # members closer than this are read in one go: a skipped 256 KiB costs less than another request


class ShardReader:
    """Opened shards, most recently used kept. One per process.

    stage_dir: a node-local folder that shards are copied to before they are read, up to stage_bytes.
    on_retry: called with (shard, cause) for every request that had to be repeated.
    """

    def __init__(
        self, stage_dir: str | None = None, stage_bytes: int = 0, on_retry: Callable[[str, str], None] | None = None
    ) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()
        self._systems: dict[str, tuple[Any, str]] = {}
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
                return OSError(f"{len(content)} of {size} bytes came")
            except OSError as error:
                if error.errno not in PASSING or attempt + 1 == LOCAL_ATTEMPTS:
                    return error
                self._on_retry(shard, f"{error}")
                if shard in self._files:
                    os.close(self._files.pop(shard))
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise AssertionError("unreachable")

    def _read_remote(self, shard: str, spans: list[tuple[int, int]]) -> list[bytes | OSError]:
        """All ranges at once; those that fail are repeated one by one."""
        system, path = self._remote(shard)
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
        try:
            answers = system.cat_ranges([path] * len(spans), starts, stops, on_error="return")
        except Exception as error:  # fsspec's back ends raise their own kinds: any of them may be a moment's failure
            answers = [error] * len(spans)
        answers = [_range_of(content, start, stop) for content, (start, stop) in zip(answers, spans)]
        return [
            content
            if isinstance(content, bytes) and len(content) == stop - start
            else self._read_again(shard, start, stop, content)
            for content, (start, stop) in zip(answers, spans)
        ]

    def _read_again(self, shard: str, start: int, stop: int, first: Any) -> bytes | OSError:
        said = f"{len(first)} of {stop - start} bytes came" if isinstance(first, bytes) else _told(first)
        self._on_retry(shard, said)
        system, path = self._remote(shard)

        def request() -> bytes:
            content = _range_of(system.cat_file(path, start=start, end=stop), start, stop)
            if len(content) != stop - start:
                raise OSError(f"{len(content)} of {stop - start} bytes came")
            return content

        time.sleep(FIRST_PAUSE_S * (1 + random.random()))
        try:
            return retry(request, lambda cause: self._on_retry(shard, cause), ATTEMPTS - 1)
        except OSError as error:
            return error

    def _remote(self, shard: str) -> tuple[Any, str]:
        if shard not in self._systems:
            import fsspec

            self._systems[shard] = fsspec.core.url_to_fs(shard, **_options(shard))
        return self._systems[shard]

    def _file(self, shard: str) -> int:
        if shard not in self._files:
            copy = self._stage.open(shard) if self._stage else None
            self._files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC) if copy is None else copy
            if len(self._files) > MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


def _told(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")


def _options(url: str) -> dict[str, Any]:
    """What fsspec's back end is told: over http a silent server is given up after a while, and asked again."""
    if not url.startswith(("http://", "https://")):
        return {"use_listings_cache": False}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return {"use_listings_cache": False, "client_kwargs": {"timeout": timeout}}


def _range_of(content: Any, start: int, stop: int) -> Any:
    """The range asked for, where a server without ranges sent the whole file."""
    return content[start:stop] if isinstance(content, bytes) and len(content) >= stop > stop - start else content


def retry(request: Callable[[], T], on_failure: Callable[[str], None], attempts: int = ATTEMPTS) -> T:
    """Repeats a remote request with growing pauses. Raises OSError, with the last cause, when it never succeeds."""
    for attempt in range(attempts):
        try:
            return request()
        except Exception as error:  # fsspec's back ends raise their own kinds: any of them may be a moment's failure
            cause = _told(error)
            on_failure(cause)
            if attempt + 1 == attempts:
                raise OSError(f"{cause} ({attempts} attempts)") from error
            time.sleep(FIRST_PAUSE_S * 2**attempt * (1 + random.random()))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def open_shard(shard: str) -> Iterator[tuple[BinaryIO, int, int]]:
    """(file, size, mtime_ns) of a shard for one pass over it; a remote one is fetched to a temporary file first."""
    if not is_remote(shard):
        with open(shard, "rb", buffering=1 << 20) as file:
            stat = os.fstat(file.fileno())
            yield file, stat.st_size, stat.st_mtime_ns
        return
    with tempfile.TemporaryFile() as file:
        if shard.startswith("pipe:"):
            done = subprocess.run(shard.removeprefix("pipe:"), shell=True, stdout=file, check=False)
            if done.returncode:
                raise OSError(f"the command ended with {done.returncode}")
        else:
            retry(lambda: _download(shard, file), lambda cause: None)
        size = file.seek(0, os.SEEK_END)
        yield file, size, 0


def _download(url: str, file: Any) -> None:
    import fsspec

    file.seek(0)
    file.truncate()
    with fsspec.open(url, "rb", block_size=0, **_options(url)) as source:
        expected = getattr(source, "size", None)
        shutil.copyfileobj(source, file, 1 << 20)
    if expected is not None and file.tell() != expected:
        raise OSError(f"{file.tell()} of {expected} bytes came")


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
