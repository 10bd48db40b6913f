"""Files that somebody else may have made: only ordinary ones are opened, and no more is read than a limit allows.

A pipe blocks for ever, a device has no end, a sparse file claims any size, a link points wherever its maker liked.
Every small file that comes from outside (runs, checkpoints, exports, evaluation folders) is read through here.
"""

import contextlib
import errno
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from amclip_ds.errors import AmclipError, NotRead, UserError, in_one_line

MAX_TEXT = 1 << 20
MAX_JSON = 16 << 20  # parsed, a hostile one takes twenty times as much memory
READ = 1 << 20
HEAD = 256
OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN),  # of any network file system in a bad moment
    errno.ESHUTDOWN,  # Lustre and Ceph, to a client that was evicted
    errno.ENOTCONN,  # a FUSE mount whose process died
    *(errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    errno.EKEYEXPIRED,  # a Kerberos ticket; EACCES is not here: it is also what a wrong path of the user says
    *(errno.ENFILE, errno.EMFILE, errno.ENOMEM),
}
"""What says nothing of a file, and may be over when it is asked again."""
TROUBLE_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)  # together below watchdog.step_timeout_s
RESUMES = "; once that is over, the same command resumes"
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR)

Kind = TypeVar("Kind")
T = TypeVar("T")


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Opens an ordinary file for reading; never blocks. Raises OSError, also for a pipe, a device, a folder.

    follow: whether `path` itself may be a symbolic link to one.
    """
    return open(path, "rb", opener=lambda *_: _open(path, os.O_RDONLY, follow))  # an opener: its name is the path


def open_to_append(path: Path) -> int:
    """A descriptor that appends to an ordinary file, made if it is missing. Raises OSError, also for a link."""
    return _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, follow=False)


def _open(path: Path, flags: int, follow: bool) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed here", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))
    return descriptor


def is_regular(path: Path) -> bool:
    """Whether an ordinary file, or a link to one, is there. Raises nothing."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, limit: int = MAX_TEXT, *, follow: bool = True) -> bytes:
    """A whole ordinary file. Raises OSError, also where it holds more than `limit` bytes."""
    parts, size = [], 0
    with open_regular(path, follow=follow) as file:
        if os.fstat(file.fileno()).st_size > limit:  # a sparse one is not filled with zeros first
            raise _too_large(path, limit)
        while part := os.read(file.fileno(), min(READ, limit + 1 - size)):  # files of /proc have size 0: to the end
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_large(path, limit)
    return b"".join(parts)


def _too_large(path: Path, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"more than the {limit} bytes that such a file may have", str(path))


def read_text(path: Path, limit: int = MAX_TEXT, *, follow: bool = True) -> str:
    """A whole text file, UTF-8. Raises UserError of one line that names it."""
    try:
        return read_bytes(path, limit, follow=follow).decode()
    except OSError as error:
        raise not_read(str(path), error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, kind: type[Kind], limit: int = MAX_JSON, *, follow: bool = True) -> Kind:
    """A JSON file whose outermost value is of that kind (dict, list). Raises UserError of one line that names it."""
    try:
        content = json.loads(read_bytes(path, limit, follow=follow))
    except OSError as error:
        raise not_read(str(path), error) from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits, or no Unicode
        raise UserError(f"{path}: not JSON: {in_one_line(error, 200)}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: its JSON is a {type(content).__name__}, not a {kind.__name__}")
    return content


def describe(error: OSError) -> str:
    """What the system said, in words."""
    return "missing" if error.errno == errno.ENOENT else (error.strerror or str(error))


def not_read(what: str, error: OSError) -> UserError:
    """The error of what cannot be read: a UserError (code 2), but NotRead (code 1) where the machine is to blame. what:
    the key or option, and the path."""
    if error.errno in OF_THE_MACHINE:
        return NotRead(f"{what}: {describe(error)}{RESUMES}")
    return UserError(f"{what}: {describe(error)}")


def not_written(what: str, error: OSError) -> AmclipError:
    """The error of what cannot be written: a UserError (code 2), but a fault of the machine (code 1) where the disk is
    full, over quota or broken, which the same command may survive later. what: the key or option, and the path.
    """
    if error.errno in OF_THE_MACHINE:
        return AmclipError(f"{what} cannot be written: {describe(error)}{RESUMES}")
    return UserError(f"{what} cannot be written: {describe(error)}")


def outlasting(what: str, request: Callable[[], T]) -> T:
    """What `request` returns, asked again for minutes while it fails with an errno of OF_THE_MACHINE or NotRead, which
    is trouble of the file system. Raises AmclipError (code 1) where it lasts, other errors as they are. what: see
    `not_read`."""
    for place, pause in enumerate((*TROUBLE_PAUSES_S, None)):
        try:
            return request()
        except NotRead as error:
            if pause is None:
                raise
            cause = str(error).removesuffix(RESUMES)
        except OSError as error:
            if error.errno not in OF_THE_MACHINE:
                raise
            cause = f"{what} cannot be read: {describe(error)}"
        if pause is not None:
            if place == 0:
                print(f"{cause}; tried again for {sum(TROUBLE_PAUSES_S):.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AmclipError(f"{cause}; once the file system is well again, the same command resumes")


def mode_at(path: str | Path, what: str = "") -> int:
    """The st_mode of what is there, 0 where nothing is, as os.path.exists has it; but trouble of the file system, which
    that calls nothing, is outlasted. Raises AmclipError as `outlasting` does. what: see `not_read`."""
    try:
        return outlasting(what or str(path), lambda: os.stat(path)).st_mode
    except (OSError, ValueError):  # ValueError: a name with a NUL byte
        return 0


def check_output(path: Path, option: str, begins: tuple[bytes, ...], at: int = 0) -> None:
    """Raises UserError where a file can never be written, or would replace one that is none of its kind: better before
    an hour's work than after it, and `--json 0.tar 1.tar` must not cost a shard.

    begins: how a file of its kind may begin, `at` bytes from its start.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written: permission denied")
    with contextlib.suppress(OSError), open_regular(path) as file:
        head = file.read(at + HEAD)
        if head and not head[at:].lstrip().startswith(begins):
            raise UserError(f"{option} {path}: holds something else; name a new file")


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes a small file so that a kill leaves the old one or the new one, never half of it. Raises OSError, with
    nothing left of the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()  # of a killed process of the same number, or a trap
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with removed_on_error(partial):
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def write_new(path: Path, text: str) -> None:
    """Writes a small file that nobody else has made: of several who try at once, one does. Raises FileExistsError for
    the others, OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with removed_on_error(path), os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of folders in it, names of files in it) of a folder and of all below it, as os.walk gives them.

    Hidden names are left out (.snapshot, .rsync-partial and .Trash hold copies), and folders that are closed to us.
    Linked folders come last, each folder once, and none that holds `folder` itself. Raises OSError: a folder that
    cannot be read just now is not an empty one, as glob has it.
    """

    def failed(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    root, seen = os.path.realpath(folder), set[str]()
    waiting = [os.fspath(folder)]
    while waiting:
        start = waiting.pop(0)
        real = os.path.realpath(start)
        if seen and f"{root}/".startswith(f"{real.rstrip('/')}/"):
            continue
        for at, folders, names in os.walk(start, onerror=failed):
            if (here := os.path.realpath(at)) in seen:
                folders.clear()
                continue
            seen.add(here)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield at, folders, sorted(name for name in names if not name.startswith("."))
            waiting += [path for name in folders if os.path.islink(path := os.path.join(at, name))]


def sync(path: Path) -> None:
    """Makes a file's content durable, or the names in a folder: the first before the rename that shows it, the second
    after it. Raises OSError, but not of a file system that has no such thing for folders."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def removed_on_error(partial: Path) -> Iterator[None]:
    """Removes a file that was to be renamed where that fails: on a full disk it would take what is left."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
