"""Batches made ahead are the same batches; errors and the end pass through the thread."""

import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from amclip_ds.data.prefetch import prefetched
from amclip_ds.errors import AmclipError

CPU = torch.device("cpu")


def counted(made: list[int], closed: list[bool], fail_at: int = 1 << 30) -> Generator[Any, None, None]:
    try:
        for number in range(fail_at):
            made.append(number)
            yield number
        raise AmclipError("shard 3 is gone")
    finally:
        closed.append(True)


def threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


def test_the_same_batches_one_made_while_one_is_used() -> None:
    made: list[int] = []
    closed: list[bool] = []
    stream = prefetched(counted(made, closed), CPU)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    deadline = time.monotonic() + 10
    while len(made) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 7, "one waits, one is in the thread's hand, and no more"
    stream.close()
    assert closed == [True] and threads() == 0


def test_an_error_comes_after_the_batches_before_it() -> None:
    closed: list[bool] = []
    stream: Iterator[Any] = prefetched(counted([], closed, fail_at=3), CPU)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(AmclipError, match="shard 3 is gone"):
        next(stream)
    assert closed == [True] and threads() == 0


def test_never_started_needs_no_end() -> None:
    prefetched(counted([], []), CPU).close()
    assert threads() == 0
