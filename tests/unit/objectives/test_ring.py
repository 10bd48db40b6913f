"""The image-text losses on a ring: the same values and gradients as the whole matrix, in memory that stays flat."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.objectives import ring
from amclip_ds.objectives.contrastive import info_nce
from amclip_ds.objectives.sigmoid import sigmoid
from amclip_ds.objectives.simclr import online_to_online
from benchmarks import losses as benchmark
from benchmarks.losses import Alike
from benchmarks.tensor_memory import TensorMemory
from tests.unit.thread_ranks import ThreadComm, run_threads

LOCAL, WIDTH = 7, 5  # samples of a rank, of which no chunk here is a divisor


def features(samples: int, views: int, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """images [V, N, E], texts [N, E], scale (1,), bias (1,)."""
    draw = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(views, samples, width, generator=draw, dtype=dtype), dim=-1)
    texts = F.normalize(torch.randn(samples, width, generator=draw, dtype=dtype), dim=-1)
    return [images, texts, torch.tensor([8.0], dtype=dtype), torch.tensor([-3.0], dtype=dtype)]


def differentiated(loss: Callable[..., Tensor], given: list[Tensor], *more: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    value = loss(*leaves, *more)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def over_ranks(
    kind: str, world_size: int, views: int, chunk: int, change: Callable[[ThreadComm], None] = lambda comm: None
) -> tuple[Tensor, list[Tensor]]:
    """Each rank differentiates its own loss; the mean of the values, and what averaging over ranks makes of the
    gradients, rows put together."""
    given = features(world_size * LOCAL, views)[: 3 if kind == "softmax" else 4]
    loss = ring.info_nce if kind == "softmax" else ring.sigmoid

    def work(comm: ThreadComm) -> tuple[Tensor, list[Tensor]]:
        change(comm)
        part = slice(comm.rank * LOCAL, (comm.rank + 1) * LOCAL)
        return differentiated(loss, [given[0][:, part], given[1][part], *given[2:]], comm, chunk)

    values, gradients = zip(*run_threads(world_size, work))
    images, texts, *rest = zip(*gradients)
    whole = [torch.cat(images, 1), torch.cat(texts), *(torch.stack(one).sum(0) for one in rest)]
    return torch.stack(values).mean(), [gradient / world_size for gradient in whole]


def whole(kind: str, world_size: int, views: int) -> tuple[Tensor, list[Tensor]]:
    given = features(world_size * LOCAL, views)[: 3 if kind == "softmax" else 4]
    return differentiated(info_nce if kind == "softmax" else sigmoid, given, SingleProcess())


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_it_is_the_loss_of_the_whole_batch(kind: str, world_size: int, chunk: int, views: int) -> None:
    value, gradients = over_ranks(kind, world_size, views, chunk)
    expected, wanted = whole(kind, world_size, views)
    torch.testing.assert_close(value, expected, atol=0, rtol=1e-12)
    for ours, theirs in zip(gradients, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def stuck(comm: ThreadComm) -> None:
    comm.ring_ahead = lambda x: lambda: x  # type: ignore[method-assign]


def lost_sums(comm: ThreadComm) -> None:
    comm.ring_shift = lambda x: x  # type: ignore[method-assign]
    exchange = comm._exchange
    comm.ring_ahead = lambda x: lambda: exchange(x)[(comm.rank + 1) % comm.world_size]  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [stuck, lost_sums])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_wrong_tile_or_a_sum_that_stays_behind_fails(kind: str, change: Callable[[ThreadComm], None]) -> None:
    """The twin."""
    value, gradients = over_ranks(kind, 3, 2, 0, change)
    expected, wanted = whole(kind, 3, 2)
    same = torch.isclose(value, expected, rtol=1e-6) and all(map(torch.allclose, gradients, wanted))
    assert not same


def test_ranks_whose_losses_count_differently() -> None:
    """A rank's own gradient reaches the texts that are its rows, and what they are in other ranks' columns."""
    given = features(2 * LOCAL, 2)[:3]

    def work(comm: ThreadComm) -> list[Tensor]:
        part = slice(comm.rank * LOCAL, (comm.rank + 1) * LOCAL)
        own = [given[0][:, part], given[1][part], given[2]]
        loss = lambda *leaves: (1 + 2 * comm.rank) * ring.info_nce(*leaves)  # noqa: E731
        return differentiated(loss, own, comm, 2)[1]

    leaves = [tensor.clone().requires_grad_() for tensor in given]
    losses = []
    for rank in range(2):
        part = slice(rank * LOCAL, (rank + 1) * LOCAL)
        labels = torch.arange(part.start, part.stop)
        for view in range(2):
            forth, back = leaves[0][view, part] @ leaves[1].T, leaves[1][part] @ leaves[0][view].T
            losses += [(1 + 2 * rank) * F.cross_entropy(leaves[2] * logits, labels) / 4 for logits in (forth, back)]
    wanted = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    ours = run_threads(2, work)
    torch.testing.assert_close(torch.cat([one[0] for one in ours], 1), wanted[0])
    torch.testing.assert_close(torch.cat([one[1] for one in ours]), wanted[1])
    torch.testing.assert_close(ours[0][2] + ours[1][2], wanted[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_is_flat_in_the_number_of_ranks(kind: str) -> None:
    """Peak bytes of forward and backward, at 1 to 16 ranks. Twin: gathering grows with them."""
    peaks: dict[str, dict[int, int]] = {"ring": {}, "other": {}}
    given = features(256, 2, 64, torch.float32)[: 3 if kind == "softmax" else 4]
    losses = (
        {"ring": ring.info_nce, "other": info_nce} if kind == "softmax" else {"ring": ring.sigmoid, "other": sigmoid}
    )
    for name, loss in losses.items():
        for world_size in (1, 2, 4, 16):
            with TensorMemory() as memory:
                differentiated(loss, given, Alike(world_size), 64)
            peaks[name][world_size] = memory.peak_bytes
    print(f"{kind}: peak kB by ranks:", {name: {w: p // 1000 for w, p in of.items()} for name, of in peaks.items()})
    assert peaks["ring"][16] == peaks["ring"][4]  # from 3 on, texts arrive while others are held
    assert peaks["other"][16] > 1.5 * peaks["other"][4]


@pytest.mark.parametrize("name", list(benchmark.LOSSES))
def test_bytes_are_counted_as_they_are_computed(name: str) -> None:
    """benchmarks/losses.py --count, which docs/results/loss-memory.md has its large batches from."""
    for world_size, chunk in ((1, 0), (4, 16)):
        rows = [
            benchmark.measured(name, benchmark.features(1, 64, 32, torch.device(device)), world_size, chunk, repeats=1)
            for device in ("cpu", "meta")
        ]
        computed, counted = ({key: row[key] for key in ("peak_mib", "kept_mib")} for row in rows)
        assert counted == computed and rows[1]["seconds"] is None


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_nt_xent_on_a_ring(world_size: int, chunk: int) -> None:
    """Against the gathered loss of the whole batch, through the normalisation. Twins: a ring that has stopped."""
    given = [torch.randn(2, world_size * LOCAL, WIDTH, generator=torch.Generator().manual_seed(1))]

    def over(change: Callable[[ThreadComm], None] = lambda comm: None) -> tuple[Tensor, Tensor]:
        def work(comm: ThreadComm) -> tuple[Tensor, list[Tensor]]:
            change(comm)
            part = slice(comm.rank * LOCAL, (comm.rank + 1) * LOCAL)
            return differentiated(lambda x: ring.online_to_online(x, 0.2, comm, chunk), [given[0][:, part]])

        values, gradients = zip(*run_threads(world_size, work))
        return torch.stack(values).mean(), torch.cat([one[0] for one in gradients], 1) / world_size

    expected, [wanted] = differentiated(lambda x: online_to_online(x, 0.2, SingleProcess()), given)
    value, gradient = over()
    torch.testing.assert_close(value, expected, atol=0, rtol=2e-6)  # the features are made fp32
    torch.testing.assert_close(gradient, wanted, atol=1e-7, rtol=1e-5)
    if world_size > 2:
        for wrong in (stuck, lost_sums):
            value, gradient = over(wrong)
            assert not (torch.isclose(value, expected, rtol=1e-5) and torch.allclose(gradient, wanted, rtol=1e-3))
