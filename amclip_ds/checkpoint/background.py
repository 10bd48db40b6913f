"""The memory and the process of an asynchronous save: a snapshot that is copied fast, and a writer that reads it."""

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclip_ds.checkpoint import failpoints, writer
from amclip_ds.checkpoint.files import PlannedFile
from amclip_ds.signals import held_back

PAGE = 4096
PROGRAM = Path(writer.__file__)


def is_possible() -> bool:
    """Whether this system has memory that a process can hand to another by its descriptor (Linux)."""
    return hasattr(os, "memfd_create")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this host, and the cgroups of this process (a Slurm job's --mem), can still give; a large number where
    nothing says. root: where /proc and /sys are."""
    left = [1 << 62, *(limit - used for limit, used in _cgroups(root))]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    return max(0, min(left))


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) of each cgroup of this process and those above it that has a limit, in bytes. What is in use
    counts the page cache too, of which the inactive files are given back on demand."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file ")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "
        else:
            continue
        own = mount / place.lstrip("/")
        for folder in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or a cgroup without this file, as the topmost is
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                rows = (folder / "memory.stat").read_text().splitlines()
                yield limit, used - sum(int(row.split()[1]) for row in rows if row.startswith(names[2]))
            if folder == mount:
                break


def host_name() -> str:
    return socket.gethostname()


class Snapshot:
    """Host memory that is reused by every save: after the first, a copy touches no new page."""

    def __init__(self) -> None:
        self.descriptor = -1
        self.size = 0
        self._memory: Tensor | None = None
        self._is_pinned = False

    def grow(self, size: int) -> bool:
        """Makes room for `size` bytes; whether that took new memory (and a new descriptor). Raises OSError."""
        if size <= self.size:
            return False
        self.close()
        self.descriptor = os.memfd_create("checkpoint")
        os.ftruncate(self.descriptor, size)
        self._memory = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        self.size = size  # last: what failed before is tried anew
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._is_pinned = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)) == 0
        return True

    def take(self, files: Iterable[PlannedFile]) -> list[dict[str, Any]]:
        """Copies the files' bytes. Returns where each is: {"path", "offset", "length"}."""
        assert self._memory is not None
        jobs, offset, on_gpu = [], 0, False
        for file in files:
            jobs.append({"path": file.path, "offset": offset, "length": file.length})
            at = offset
            for piece in file.pieces:
                if isinstance(piece, bytes):
                    piece = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
                flat = piece.detach().view(-1)
                target = self._memory[at : at + flat.numel() * flat.element_size()]
                if at % flat.element_size() == 0:
                    target = target.view(flat.dtype)  # a fifth faster than byte by byte
                else:
                    flat = flat.view(torch.uint8)
                target.copy_(flat, non_blocking=self._is_pinned)
                on_gpu |= flat.is_cuda
                at += flat.numel() * flat.element_size()
            offset += -(-file.length // PAGE) * PAGE
        if on_gpu:
            torch.cuda.synchronize()
        return jobs

    def close(self) -> None:
        """Gives the memory back, once nobody else maps it."""
        if self._memory is not None and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self._memory, self.descriptor, self.size, self._is_pinned = None, -1, 0, False


def size_of(files: Iterable[PlannedFile]) -> int:
    """Bytes a snapshot of the files takes."""
    return sum(-(-file.length // PAGE) * PAGE for file in files)


class WriterProcess:
    """writer.py as a child of this process, with the snapshot's descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        with held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", str(PROGRAM), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[descriptor],
            )
        assert self._process.stdin and self._process.stdout
        os.set_blocking(self._process.stdout.fileno(), False)
        self._answer = b""

    def send(self, folder: Path, files: list[dict[str, Any]]) -> None:
        """Starts a job."""
        job = {"fd": self.descriptor, "folder": str(folder), "files": files, "armed": sorted(failpoints.ARMED)}
        assert self._process.stdin
        self._answer = b""
        with contextlib.suppress(BrokenPipeError):  # `answer` reports that it ended
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """The job's {"files"} or {"error"}; None while it works."""
        assert self._process.stdout
        while chunk := self._process.stdout.read(1 << 16):
            self._answer += chunk
        if self._answer.endswith(b"\n"):
            return json.loads(self._answer)
        status = self._process.poll()
        return None if status is None else {"error": f"the process that writes ended by itself (status {status})"}

    def close(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream:
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a dead file system: it ends when that does
            self._process.wait(timeout=5.0)
