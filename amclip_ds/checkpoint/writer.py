"""Writes and hashes a rank's files: in the trainer (synchronous), or as its background process (asynchronous).

As a program (`writer.py PID`, the trainer's) it reads one job a line from standard input and answers one line each:
    {"fd": memory, "folder": "...", "files": [{"path", "offset", "length"}], "armed": [...]}
    -> {"files": {path: {"bytes", "sha256"}}} or {"error": "..."}
The memory is the trainer's snapshot (a memfd), so nothing is copied between the two. Only the standard library is
imported: the process costs neither a second nor memory. It is started with the signals held back that stop a run,
since a save under way is finished, and dies with its trainer.
"""

import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __package__:
    from amclip_ds.checkpoint import failpoints
else:  # run as a program: without the package, whose import costs seconds
    import failpoints  # type: ignore[no-redef,import-not-found]

CHUNK = 16 << 20
PR_SET_PDEATHSIG = 1


def write_file(path: Path, pieces: Iterable[memoryview | bytes]) -> dict[str, Any]:
    """Writes `pieces` one after the other to a new file and syncs it. Returns {"bytes", "sha256"}. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    failpoints.reached("write_begin")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        with ThreadPoolExecutor(1) as hasher:
            for chunk in _chunks(pieces):
                hashed = hasher.submit(digest.update, chunk)  # beside the write: neither holds the interpreter
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
                hashed.result()
                failpoints.reached("write_middle")
        failpoints.reached("write_fsync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    failpoints.reached("write_end")
    return {"bytes": size, "sha256": digest.hexdigest()}


def _chunks(pieces: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]


def sync_folder(path: Path) -> None:
    """Makes the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The hash of a file's content, read in chunks."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # its size and kind are checked already
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def describe(error: BaseException, path: Path | None = None) -> str:
    """One line that names what failed and where."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or path
        return f"{error.strerror}: {where}" if where else error.strerror
    return f"{type(error).__name__}: {error}" + (f": {path}" if path else "")


def do(job: dict[str, Any]) -> dict[str, Any]:
    """One job: writes each file from its range of the shared memory."""
    failpoints.ARMED.update(job["armed"])
    folder, done = Path(job["folder"]), {}
    path = folder
    try:
        # Not closed by hand: an error's traceback still holds views into it, and closing would then raise another one.
        memory = memoryview(mmap.mmap(job["fd"], 0, prot=mmap.PROT_READ))
        for file in job["files"]:
            path = folder / file["path"]
            done[file["path"]] = write_file(path, [memory[file["offset"] : file["offset"] + file["length"]]])
        for path in sorted({(folder / file["path"]).parent for file in job["files"]}):
            sync_folder(path)
    except (OSError, ValueError) as error:
        return {"error": describe(error, path)}
    return {"files": done}


def main(trainer: int) -> None:
    """Serves jobs until standard input ends. trainer: the process that started this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != trainer:  # it ended before the request
            return
    failpoints.VICTIMS.append(trainer)
    os.nice(5)  # training goes first
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
