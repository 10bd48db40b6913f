"""Batches made ahead are the same batches; errors and the end pass through the thread."""

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from amclip_ds.data.prefetch import Uploads, prefetched
from amclip_ds.errors import AmclipError
from tests.distributed.batches import made_batch

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


def test_on_a_cpu_a_batch_is_sent_nowhere() -> None:
    """On a GPU: tests/gpu/test_uploads.py."""
    draw = torch.Generator().manual_seed(0)
    pixels, noise = torch.rand(1, 2, 3, 8, 8, generator=draw), torch.rand(1, 2, 4, generator=draw)
    batch = made_batch(pixels, None, noise, torch.ones(2, 5, dtype=torch.long))
    [(_, received)] = zip(range(1), prefetched((batch for _ in range(3)), CPU))
    assert received is batch
    uploads = Uploads(CPU)
    assert uploads.send(batch) == (batch, None) and uploads.receive(uploads.send(batch)) is batch
    moved = batch.to(CPU)
    assert batch.tensors().keys() >= {"views_uint8", "boxes", "mask_noise", "token_ids", "sample_ids"}
    assert all(torch.equal(tensor, batch.tensors()[name]) for name, tensor in moved.tensors().items())


class StandIn:
    """A CUDA stream of which the log says what it was asked for; its device is meta, so that copies need no GPU."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, torch.device("meta")

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks the end")
        return "the end"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_for_a_gpu_copies_are_of_their_own_stream_and_the_steps_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, and every tensor that was sent is noted as read by the step's stream."""
    log: list[str] = []
    side, step = StandIn("side", log), StandIn("step", log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name} reads"))

    @contextlib.contextmanager
    def on(stream: StandIn) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "stream", on)
    batch = made_batch(torch.rand(1, 2, 3, 8, 8), None, torch.rand(1, 2, 4), torch.ones(2, 5, dtype=torch.long))
    uploads = Uploads(torch.device("cuda", 0))
    sent = uploads.send(batch)
    assert log == ["on side", "side marks the end", "off side"]
    assert {tensor.device.type for tensor in sent[0].tensors().values()} == {"meta"}
    log.clear()
    assert uploads.receive(sent) is sent[0]
    assert log == ["step waits for the end", *["step reads"] * len(batch.tensors())]


def test_never_started_needs_no_end() -> None:
    prefetched(counted([], []), CPU).close()
    assert threads() == 0
