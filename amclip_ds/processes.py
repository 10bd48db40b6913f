"""Runs a function over shards in processes; an item that kills its process is named, and neither ends nor hangs all."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerCrashed(Exception):
    """The process that worked on an item ended by itself: a crash in a decoder, or killed for memory."""


def map_in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> Iterator[Result | WorkerCrashed]:
    """Calls `work` (a picklable function) on every item, and yields in the items' order its result, or WorkerCrashed.

    processes: 1 or fewer works in this process. They are forked from a server that has imported `work`'s module once,
    never from this process, whose threads and locks a fork would tear. An exception of `work` itself is raised.
    Take it to its end (zip with strict=True): left to the garbage collector it would join its threads from any thread.
    """
    if processes <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    done = 0
    while done < len(items):
        # A broken pool fails every unfinished item alike. The next one runs again alone, which shows whether it is the
        # failing item; the rest get a new pool.
        try:
            pool = _pool(work, min(processes, len(items) - done))
        except OSError as error:  # its locks are in /dev/shm, which may be full
            print(f"data: no worker processes ({error.strerror}; /dev/shm full?): one by one", file=sys.stderr)
            yield from map(work, items[done:])
            return
        with pool:
            with without_main():
                futures = [pool.submit(work, item) for item in items[done:]]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if done < len(items):
            yield _alone(work, items[done])
            done += 1


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not run the program's own file, as multiprocessing has them do: a script
    that trains would train in each of them. What they are sent must not be of that file."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _alone(work: Callable[[Item], Result], item: Item) -> Result | WorkerCrashed:
    with _pool(work, 1) as pool:
        try:
            with without_main():
                future = pool.submit(work, item)
            return future.result()
        except BrokenProcessPool:
            return WorkerCrashed("its process died: a crash in a decoder, or no memory left")


def _pool(work: Callable, processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(work, "func", work).__module__])  # the function inside a functools.partial
    return ProcessPoolExecutor(processes, mp_context=context)
