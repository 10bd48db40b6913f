"""Files that a run only adds to, and that cannot end it: what the disk does not take is held in memory until it does.

    backlog = Backlog(recovered)
    backlog.append(path, content)       # raises nothing; full, read-only, over quota, gone, not permitted: all the same
    backlog.close()                     # waits a little for what is still held

A trouble is reported on standard error when it begins and when it is over; then `recovered` is given what was late and
what was lost. Each file's part of the memory has a bound, beyond which its oldest lines are lost, and counted.
"""

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from amclip_ds import files, jsonl

MAX_HELD = 32 << 20  # bytes a file
RETRY_S = 1.0
PATIENCE_S = 10.0  # at the end


@dataclass
class _File:
    """One file, and what it has not taken yet."""

    add: Callable[[Path, bytes], None]
    """raises OSError where not all was added; then it is added again, whole"""
    waiting: deque[bytes] = field(default_factory=deque)
    size: int = 0
    retry_at: float = 0.0
    trouble: "_Trouble | None" = None


@dataclass
class _Trouble:
    """One cause in one folder, whatever files it holds up."""

    cause: str
    since: float
    files: set[Path] = field(default_factory=set)
    late: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)


class Backlog:
    """A process's files. recovered(cause, outcome) is called when a trouble is over. Threads may share one."""

    def __init__(self, recovered: Callable[[str, str], None]) -> None:
        self._recovered = recovered
        self._files: dict[Path, _File] = {}
        self._troubles: dict[tuple[Path, int | None], _Trouble] = {}
        self._lock = threading.RLock()

    def append(self, path: Path, content: bytes, head: bytes | None = None) -> None:
        """Adds to a file: whole lines, which other processes may add to as well. With `head`, which begins the file,
        records that nobody else writes: a part of one is taken back, and a folder that is missing is made."""

        def add(path: Path, content: bytes) -> None:
            _add_record(path, content, head or b"")

        self._hold(path, content, jsonl.append if head is None else add)

    def replace(self, path: Path, text: str) -> None:
        """Makes `text` the file's whole content, old or new in any case."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                file.waiting.clear()
                file.size = 0
            self._hold(path, text.encode(), lambda path, content: files.write_atomically(path, content.decode()))

    def close(self, patience_s: float = PATIENCE_S) -> bool:
        """Waits until everything is written, or as long as that; then says what is lost. Whether all is written."""
        deadline = time.monotonic() + patience_s
        with self._lock:
            while True:
                self._write_what_waits(at_once=True)
                if not self._troubles or time.monotonic() > deadline:
                    break
                time.sleep(0.2)
            for trouble in self._troubles.values():
                left = Counter({path.name: len(self._files[path].waiting) for path in trouble.files})
                _say(f"{trouble.cause} to the end; lost: {_counts(trouble.lost + left)}")
            is_all_written = not self._troubles
            self._files.clear()
            self._troubles.clear()
            return is_all_written

    def _hold(self, path: Path, content: bytes, add: Callable[[Path, bytes], None]) -> None:
        with self._lock:
            file = self._files.setdefault(path, _File(add))
            file.add = add
            file.waiting.append(content)
            file.size += len(content)
            if file.trouble is not None:
                file.trouble.late[path.name] += 1
            self._write_what_waits()
            while file.size > MAX_HELD and file.trouble is not None:
                file.size -= len(file.waiting.popleft())
                file.trouble.lost[path.name] += 1

    def _write_what_waits(self, at_once: bool = False) -> None:
        now = time.monotonic()
        for path, file in list(self._files.items()):
            if file.waiting and (at_once or now >= file.retry_at):
                self._write(path, file)

    def _write(self, path: Path, file: _File) -> None:
        try:
            while file.waiting:
                file.add(path, file.waiting[0])
                file.size -= len(file.waiting.popleft())
        except OSError as error:
            file.retry_at = time.monotonic() + RETRY_S
            if file.trouble is None:
                self._begin(path, file, error)
            return
        if file.trouble is not None:
            self._end(path, file)

    def _begin(self, path: Path, file: _File, error: OSError) -> None:
        key = (path.parent, error.errno)
        trouble = self._troubles.get(key)
        if trouble is None:
            cause = f"{path} cannot be written ({files.describe(error)})"
            trouble = self._troubles[key] = _Trouble(cause, time.monotonic())
            _say(f"{cause}: the work continues, what is recorded is held in memory")
        trouble.files.add(path)
        trouble.late[path.name] += len(file.waiting)
        file.trouble = trouble

    def _end(self, path: Path, file: _File) -> None:
        trouble, file.trouble = file.trouble, None
        assert trouble is not None
        trouble.files.discard(path)
        if trouble.files:
            return
        self._troubles = {key: other for key, other in self._troubles.items() if other is not trouble}
        lost = f"lost: {_counts(trouble.lost)}" if trouble.lost else "nothing is lost"
        outcome = f"written after {time.monotonic() - trouble.since:.0f} s: {_counts(trouble.late)}; {lost}"
        _say(f"{path.parent} can be written again; {outcome}")
        self._recovered(trouble.cause, outcome)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))


def _say(text: str) -> None:
    print(f"amclip: {text}", file=sys.stderr, flush=True)


def _add_record(path: Path, content: bytes, head: bytes) -> None:
    """Adds to a file that is this process's alone. Raises OSError with the file as it was."""
    path.parent.mkdir(exist_ok=True)
    descriptor = files.open_to_append(path)
    try:
        size = os.fstat(descriptor).st_size
        left = content if size else head + content
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
