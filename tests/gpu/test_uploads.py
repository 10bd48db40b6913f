"""On a real GPU batches come on a stream of their own: a step reads them whole, whatever either stream has in hand."""

from collections.abc import Generator
from dataclasses import replace

import pytest
import torch

from amclip_ds.data.batch import Batch
from amclip_ds.data.prefetch import Uploads, prefetched
from tests.distributed.batches import made_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CYCLES = 10**8  # some 50 ms
BATCHES = 8


def numbered(number: int) -> Generator[Batch, None, None]:
    """Batches whose every pixel and every sample's id is their number, from the next one on, page-locked as the
    loader's."""
    draw = torch.Generator().manual_seed(0)
    noise, ids = torch.rand(2, 64, 196, generator=draw), torch.ones(64, 20, dtype=torch.long)
    batch = made_batch(torch.zeros(2, 64, 3, 64, 64), None, noise, ids)
    while True:
        number += 1
        pixels = torch.full((2, 64, 3, 64, 64), number, dtype=torch.uint8).pin_memory()
        yield replace(batch, views_uint8=pixels, sample_ids=torch.full((64,), number))


def reads_all(slow_step: bool, number: int) -> bool:
    """Whether steps read of BATCHES batches behind a number what was sent, pixels and ids, on the caller's stream.

    number: another one for each call, so that no memory holds what is expected from the call before.
    """
    stream = prefetched(numbered(number), torch.device("cuda", 0))
    least, largest = [], []
    for _ in range(BATCHES):
        batch = next(stream)
        if slow_step:  # the host is ahead of the device: the batch is let go before it is read
            torch.cuda._sleep(CYCLES)
        for tensor in (batch.views_uint8, batch.sample_ids):
            least.append(tensor.min().long())
            largest.append(tensor.max().long())
        del batch, tensor
    found = torch.stack(least).tolist(), torch.stack(largest).tolist()
    stream.close()
    return found == ([number + 1 + place // 2 for place in range(2 * BATCHES)],) * 2


@pytest.mark.parametrize("is_kept", [True, False], ids=["whole", "twin"])
def test_memory_is_not_taken_before_a_slow_step_has_read_it(is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_kept:
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    assert reads_all(slow_step=True, number=0 if is_kept else 50) == is_kept


@pytest.mark.parametrize("waits", [True, False], ids=["whole", "twin"])
def test_a_step_waits_for_a_slow_copy(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Batch.to

    def slow(batch: Batch, device: torch.device) -> Batch:
        torch.cuda._sleep(CYCLES)
        return send(batch, device)

    monkeypatch.setattr(Batch, "to", slow)
    if not waits:
        monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    assert reads_all(slow_step=False, number=100 if waits else 150) == waits


def test_a_copy_is_done_beside_a_step() -> None:
    torch.cuda._sleep(20 * CYCLES)
    step = torch.cuda.current_stream().record_event()
    batch, arrived = Uploads(torch.device("cuda", 0)).send(next(numbered(0)))
    assert arrived is not None and batch.views_uint8.is_cuda
    arrived.synchronize()
    assert not step.query()
