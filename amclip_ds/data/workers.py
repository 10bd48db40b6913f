"""The loader's worker processes: a place goes in, the chunk of that place comes out, in the order of the places.

    workers = Workers(make, places, config)
    workers.next()      # the next place's chunk, whatever became of the process that was making it

Chunks are pure functions of their places. So a worker that dies is replaced, the new one is asked for the same places,
and the stream is the same to the bit. Chunks travel in memory of their own (memfd), whose descriptor is sent over a
socket: nothing depends on the size of /dev/shm, which is 64 MB in a container unless somebody asked for more.
"""

import contextlib
import ctypes
import io
import mmap
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from amclip_ds.errors import AmclipError
from amclip_ds.processes import without_main
from amclip_ds.signals import held_back

Place = tuple[int, int, int]
"""(epoch, start, stop)"""
PLACE = struct.Struct("<3q")
HEAD = struct.Struct("<q")  # bytes of the pickle at the memory's start
ALIGNED = 64
DEATHS_BORNE = 3  # over one place: it is the place then, or the machine
START_ATTEMPTS = 4
JOIN_TIMEOUT_S = 5.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BUFFER = 1 << 20


def start_worker_server() -> None:
    """Starts the process that workers are forked from, where there is none. It has none of this one's threads and
    devices, imports what workers need while the run builds its model, and hands down that signals to the whole group
    are not theirs. Raises AmclipError."""
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.set_forkserver_preload(["amclip_ds.data.worker_imports"])
    try:
        resource_tracker.ensure_running()
        with held_back():
            forkserver.ensure_running()
    except OSError as error:
        raise AmclipError(f"data.workers: no worker process can be started: {error}") from None


def fork_worker_server() -> None:
    """Starts that process as a fork of this one, which has imported worker_imports: nothing is imported again. Only
    where this process has no threads yet and its signals are held back.

    What multiprocessing knows of its server is set as its own start does, but for its resource tracker, whose start
    lets signals through. Another Python may keep it elsewhere: there the server is started as ever, when it is asked
    for.
    """
    from multiprocessing import connection, forkserver

    known: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if sys.version_info >= (3, 14) or not hasattr(known, "_forkserver_alive_fd"):
        return
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        ended, alive = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(alive)
            try:
                forkserver.main(listener.detach(), ended, [])
            finally:
                os._exit(0)
        os.close(ended)
    known._forkserver_address, known._forkserver_alive_fd, known._forkserver_pid = address, alive, pid


@dataclass
class _Worker:
    """One process, this side's end of its socket, and what it was asked for and has not given yet."""

    process: BaseProcess
    socket: socket.socket
    asked: deque[Place] = field(default_factory=deque)


class Workers:
    """Processes that make chunks. make: picklable, called with a place in the processes. places: without end.

    ahead: places that each worker is asked for before its first one is wanted. timeout_s: the longest wait for a chunk.
    died: called with what became of a worker that is being replaced. prepare: picklable, called in each process before
    `make` is unpickled there.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        places: Iterator[Place],
        *,
        number: int,
        ahead: int,
        timeout_s: float,
        died: Callable[[str], None],
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self._prepare, self._pickled = prepare, pickle.dumps(make)
        self._places, self._timeout_s, self._died = places, timeout_s, died
        self._turn = self._deaths = 0
        self._workers: list[_Worker] = []
        self._processes: list[BaseProcess] = []
        # multiprocessing waits at exit for what it started, and asks by SIGTERM, which they do not hear.
        self._end = weakref.finalize(self, _kill_all, self._processes)
        for _ in range(number):
            self._workers.append(self._start())
        for _ in range(ahead):
            for worker in self._workers:
                self._ask(worker, next(places))

    def next(self) -> Any:
        """The next place's chunk. Raises AmclipError for one that does not come in time, or kills whoever makes it."""
        worker = self._workers[self._turn % len(self._workers)]
        while True:
            try:
                made = _receive(worker.socket)
                break
            except TimeoutError:
                limit = f"data.timeout_s={self._timeout_s:g} s"
                raise AmclipError(f"data.train: no sample came within {limit}") from None
            except (OSError, EOFError, pickle.UnpicklingError):
                self._replace(worker)
        self._turn += 1
        self._deaths = 0
        worker.asked.popleft()
        self._ask(worker, next(self._places))
        return made

    def close(self) -> None:
        """Ends the processes now, whatever they do."""
        for worker in self._workers:
            worker.socket.close()
        self._end()

    def _start(self) -> _Worker:
        for attempt in range(START_ATTEMPTS):
            start_worker_server()  # it may have been killed too; killed just now, it seems to live for a moment
            # A server that is killed while it starts a worker may have started it: each attempt has a socket of its
            # own, for two workers on one would share the places between them, and their chunks come out of order.
            ours, theirs = socket.socketpair()
            ours.settimeout(self._timeout_s)
            context = multiprocessing.get_context("forkserver")
            process = context.Process(target=_work, args=(theirs, self._prepare, self._pickled), daemon=True)
            try:
                with theirs, without_main():
                    process.start()
            except (OSError, EOFError) as error:
                cause = error
                ours.close()
                time.sleep(attempt)
            else:
                self._processes.append(process)
                return _Worker(process, ours)
        raise AmclipError(f"data.workers: no worker process can be started: {cause}")

    def _ask(self, worker: _Worker, place: Place) -> None:
        worker.asked.append(place)
        with contextlib.suppress(OSError):  # it is gone, which the next wait for it will show
            worker.socket.sendall(PLACE.pack(*place))

    def _replace(self, worker: _Worker) -> None:
        """Another process in a dead one's place, asked for the same. Raises AmclipError if that does not help."""
        if not self._end.alive:
            raise AmclipError("data.train: the workers were ended")
        worker.socket.close()
        worker.process.kill()  # its socket may be closed and itself alive
        worker.process.join(JOIN_TIMEOUT_S)
        cause = f"a worker process died ({_describe(worker.process.exitcode)})"
        self._processes.remove(worker.process)
        self._deaths += 1
        if self._deaths == DEATHS_BORNE:
            raise AmclipError(
                f"data.train: {cause}, the {self._deaths}rd one over the same samples: no memory left, or a decoder"
                f" that crashes; `amclip data check` names the shard"
            )
        self._died(cause)
        asked = worker.asked
        new = self._start()
        worker.process, worker.socket, worker.asked = new.process, new.socket, deque()
        for place in asked:
            self._ask(worker, place)


def _describe(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    return f"exit {exitcode}"


def _kill_all(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(JOIN_TIMEOUT_S)
    processes.clear()


# ---------------------------------------------------------------- the worker's side


def _work(ours: socket.socket, prepare: Callable[[], object] | None, pickled: bytes) -> None:
    """Makes what it is asked for until the other side is closed. pickled: what makes it."""
    _become_worker()
    if prepare is not None:
        prepare()
    make = pickle.loads(pickled)
    with ours, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody wants any more
        while len(place := ours.recv(PLACE.size, socket.MSG_WAITALL)) == PLACE.size:
            try:
                made = make(*PLACE.unpack(place))
            except Exception as error:  # a fault of ours: it must not look like a process that was killed
                traceback.print_exc()
                made = Fault(f"data.train: a worker failed: {type(error).__name__}: {error}")
            _send(ours, made)


@dataclass(frozen=True)
class Fault:
    """What a worker gives for a place at which its code failed."""

    cause: str


def _become_worker() -> None:
    """In a new worker: it takes one core, gives memory back, and does not outlive the run."""
    torch.set_num_threads(1)
    _give_memory_back()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _give_memory_back() -> None:
    """Keeps large buffers out of the heap. glibc moves its threshold up when they are freed, and decoded images of
    all sizes then leave holes that a worker never gives back (measured). What a resize needs for a moment is smaller:
    new pages for it would cost a tenth of a worker's time."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER)
            libc.mallopt(M_TRIM_THRESHOLD, LARGE_BUFFER)


def _end_with_the_run() -> None:
    """Ends this worker when the training process ends, however it does. Its parent is the server, which itself lives
    until the last worker is gone, so that nothing but this pipe says so."""
    run = multiprocessing.parent_process()
    if run is not None:
        multiprocessing.connection.wait([run.sentinel])
        os._exit(1)


# ---------------------------------------------------------------- the way between


class _Pickler(pickle.Pickler):
    """Tensors go as arrays, whose bytes stay outside the pickle."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _send(to: socket.socket, value: Any) -> None:
    """A value with its arrays, in memory that the receiver takes over. Raises OSError."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=arrays.append).dump(value)
    raw = [array.raw() for array in arrays]
    head = pickle.dumps((pickled.getvalue(), [len(part) for part in raw]))
    descriptor = _memory()
    try:
        with os.fdopen(os.dup(descriptor), "wb", buffering=0) as file:
            file.write(head)
            at = _aligned(len(head))
            for part in raw:
                file.seek(at)
                while part:
                    part = part[file.write(part) :]
                at = _aligned(file.tell())
            file.truncate(max(at, 1))
        socket.send_fds(to, [HEAD.pack(len(head))], [descriptor])
    finally:
        os.close(descriptor)


def _receive(source: socket.socket) -> Any:
    """What `_send` sent; its arrays are in the memory itself. Raises EOFError, OSError."""
    message, descriptors, _, _ = socket.recv_fds(source, HEAD.size, 1)
    if len(message) < HEAD.size or not descriptors:
        raise EOFError
    try:
        memory = mmap.mmap(descriptors[0], 0)
    finally:
        os.close(descriptors[0])
    [length] = HEAD.unpack(message)
    pickled, lengths = pickle.loads(memory[:length])
    buffers, at = [], _aligned(length)
    for size in lengths:
        buffers.append(memoryview(memory)[at : at + size])
        at = _aligned(at + size)
    return pickle.loads(pickled, buffers=buffers)


def _aligned(at: int) -> int:
    return -(-at // ALIGNED) * ALIGNED


def _memory() -> int:
    """The descriptor of memory that nobody else has by name; where the system has none, of a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("chunk")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
