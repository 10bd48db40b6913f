"""How long this rank waited in collectives: DeepSpeed's, the losses', the batch norm's, the teacher's.

What is timed is the wait that the step feels. On a CPU that is the wall time of the call, or of `wait()` where the call
returned at once; on a GPU the time between two events on the current stream, so communication that runs hidden beside
the computation counts for nothing. Waiting for a slower rank counts: it looks the same from here.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

COLLECTIVES = {
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
}
MOST_EVENTS = 10_000  # pairs not yet added up; a GPU's events are not free


class CommunicationTime:
    """A clock that runs while the step waits for collectives."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times what is done inside. The time of a call that raises is not counted."""
        if not torch.cuda.is_initialized():  # a flag; asking for devices at every collective would cost
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))
        if len(self._events) > MOST_EVENTS:
            self._add_up()

    def take(self) -> float:
        """Seconds since the last take. On a GPU it waits until the device has done what was timed."""
        self._add_up()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is done inside. It waits for no device: what was timed so far is set aside and put back."""
        seconds, events, self._events = self._seconds, self._events, []
        yield
        self._seconds, self._events = seconds, events

    def _add_up(self) -> None:
        for first, last in self._events:
            last.synchronize()  # of each: ZeRO-3 gathers and reduces on streams of their own, which end in any order
            self._seconds += first.elapsed_time(last) / 1000
        self._events.clear()


COMMUNICATION = CommunicationTime()  # a process has one world, and so one such clock


class _TimedBackend:
    """DeepSpeed's communication backend, with its collectives timed; everything else is passed on."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return _timed(found) if name in COLLECTIVES and callable(found) else found


class _TimedWork:
    """The handle of a collective that returned at once: waiting for it is what is timed."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any, **named: Any) -> Any:
        with COMMUNICATION.waiting():
            return self._work.wait(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        with COMMUNICATION.waiting():
            work = collective(*args, **named)
        return _TimedWork(work) if hasattr(work, "wait") else work

    return call


def time_engine_collectives() -> None:
    """From here on DeepSpeed's collectives in this process are timed. Needs its process group; does nothing twice."""
    import deepspeed.comm.comm as ds_comm

    if ds_comm.cdb is not None and not isinstance(ds_comm.cdb, _TimedBackend):
        ds_comm.cdb = _TimedBackend(ds_comm.cdb)
