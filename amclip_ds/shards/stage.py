"""Copies of shards on a node-local disk (data.stage_dir), within a budget; the least recently used copy goes first.

The folder may be shared with everybody, so the copies are in a folder of this user alone in it (`amclip-UID`, 0700),
which is reached through a descriptor: what others put beside it, or in its place later, is never opened. A copy is
read only if it is an ordinary file of ours with one name and the shard's size; whether its samples are those that were
indexed is seen where they are read (chunks.py).
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from amclip_ds.errors import UserError
from amclip_ds.files import not_written

FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a link is refused, a pipe does not block


class Stage:
    """One process copies a shard; those that want it meanwhile read the original. Raises UserError for the folder."""

    def __init__(self, folder: str | Path, budget: int) -> None:
        self.folder = _place_in(folder)
        self._budget = budget
        self._fd = _private_folder(self.folder)

    def open(self, shard: str) -> int | None:
        """A descriptor of the shard's copy; None: none yet, no space, or the copy failed; the shard serves."""
        source = os.stat(shard)
        copy = self.name_of(shard)
        found = self._open_copy(copy, source.st_size)
        if found is not None or source.st_size > self._budget:
            return found
        try:
            with self._locked(copy):
                self._remove(f".{copy}.partial")  # of a process that was killed
                found = self._open_copy(copy, source.st_size)
                if found is None and self._make_room(source.st_size) and self._copy(shard, copy):
                    found = self._open_copy(copy, source.st_size)
            return found
        except OSError:  # another process is at it, or the disk is full
            return None

    def name_of(self, shard: str) -> str:
        """The copy's name: another one for another place, size or time of the shard."""
        source = os.stat(shard)
        named = f"{os.path.abspath(shard)} {source.st_size} {source.st_mtime_ns}".encode("utf-8", "surrogateescape")
        return f"{hashlib.blake2b(named, digest_size=8).hexdigest()}-{Path(shard).name}"

    def drop(self, shard: str) -> None:
        """Removes a shard's copy, whose content is not the shard's."""
        with contextlib.suppress(OSError):
            self._remove(self.name_of(shard))

    def _open_copy(self, copy: str, size: int) -> int | None:
        """An existing copy, if it can be ours; one that cannot is removed."""
        try:
            descriptor = os.open(copy, os.O_RDONLY | FLAGS, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError:
            self._remove(copy)
            return None
        held = os.fstat(descriptor)
        if stat.S_ISREG(held.st_mode) and held.st_uid == os.geteuid() and held.st_nlink == 1 and held.st_size == size:
            os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        self._remove(copy)
        return None

    @contextlib.contextmanager
    def _locked(self, copy: str) -> Iterator[None]:
        """Holds the copy's lock. Raises OSError where another process holds it."""
        lock = os.open(f".{copy}.lock", os.O_RDWR | os.O_CREAT | FLAGS, 0o600, dir_fd=self._fd)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(lock)

    def _copy(self, shard: str, copy: str) -> bool:
        """Copies under the lock; False where the shard changed meanwhile. Raises OSError."""
        partial = f".{copy}.partial"
        try:
            target = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, 0o600, dir_fd=self._fd)
            with open(shard, "rb") as source, os.fdopen(target, "wb") as file:
                before = os.fstat(source.fileno())
                shutil.copyfileobj(source, file, 1 << 20)
                after, size = os.fstat(source.fileno()), file.tell()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or size != after.st_size:
                return False
            os.rename(partial, copy, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            return True
        finally:
            self._remove(partial)

    def _make_room(self, size: int) -> bool:
        held = []
        for name in os.listdir(self._fd):
            with contextlib.suppress(OSError):  # another process may remove it at the same moment
                if name.endswith(".partial") and self._is_abandoned(name):
                    self._remove(name)
                elif not name.endswith(".lock"):
                    found = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                    held.append((found.st_mtime, found.st_size, name))
        used = sum(num_bytes for _, num_bytes, _ in held)
        for _, num_bytes, name in sorted(held):
            if used + size <= self._budget:
                break
            if not name.startswith("."):  # a dot: being copied
                used -= num_bytes
                self._remove(name)
        return used + size <= self._budget

    def _is_abandoned(self, partial: str) -> bool:
        """Whether nobody is copying into it any more."""
        try:
            with self._locked(partial.removeprefix(".").removesuffix(".partial")):
                return True
        except OSError:
            return False

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):
                raise


def check_stage(folder: str | Path) -> None:
    """Makes the folder of this node's copies, in `folder`. Raises UserError, AmclipError where the disk is full."""
    os.close(_private_folder(_place_in(folder)))


def _place_in(folder: str | Path) -> Path:
    return Path(folder) / f"amclip-{os.geteuid()}"


def _private_folder(folder: Path) -> int:
    """A descriptor of a folder that is this user's alone, made where it is missing. Raises UserError, AmclipError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | FLAGS)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise not_written(f"data.stage_dir: {folder}", error) from None
        raise UserError(f"data.stage_dir: {folder} cannot be made: is a link, or no folder") from None
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(descriptor)
        whose = "is another user's" if found.st_uid != os.geteuid() else f"is open to others (chmod 700 {folder})"
        raise UserError(f"data.stage_dir: {folder} {whose}; copies there could be anybody's: name another folder")
    return descriptor
