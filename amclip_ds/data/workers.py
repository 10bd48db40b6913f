"""The loader's worker processes: where they come from, what they must not hear, how they end."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from typing import Any

from amclip_ds.errors import AmclipError

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # the run's own process decides what these mean
FAREWELL_S = 5.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BUFFER = 1 << 17


def start_worker_server() -> None:
    """Starts the process that workers are forked from. It has none of this one's threads and devices, imports what
    workers need while the run builds its model, and hands down that signals to the whole group are not theirs."""
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.set_forkserver_preload(["amclip_ds.data.worker_imports"])
    try:
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except OSError as error:
        raise AmclipError(f"data.workers: no worker process can be started: {error}") from None


def end_workers(stream: Any) -> None:
    """Ends a torch iterator's workers now. Its own way, which waits for garbage collection, leaves them running while
    a traceback holds the iterator; and it asks by SIGTERM, which they do not hear."""
    processes = list(stream._workers)
    stream._shutdown_workers()
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join(FAREWELL_S)


def become_worker(worker: int) -> None:
    """In a new worker: signals are the run's business, and it does not outlive the run."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    _give_memory_back()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _give_memory_back() -> None:
    """Keeps large buffers out of the heap. glibc moves its threshold up when they are freed, and decoded images of
    all sizes then leave holes that a worker never gives back (measured: docs/log.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER)
            libc.mallopt(M_TRIM_THRESHOLD, LARGE_BUFFER)


def _end_with_the_run() -> None:
    """Ends this worker when the training process ends, however it does. Its parent is the server, which itself lives
    until the last worker is gone, so that nothing but this pipe tells."""
    run = multiprocessing.parent_process()
    if run is not None:
        multiprocessing.connection.wait([run.sentinel])
        os._exit(1)
