import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.objectives.byol import online_to_ema
from amclip_ds.objectives.simclr import online_to_online
from tests.unit.thread_ranks import ThreadComm, run_threads

N, P = 8, 6


def features(views: int = 2) -> Tensor:
    return torch.randn(views, N, P, generator=torch.Generator().manual_seed(0)).requires_grad_()


def dense_nt_xent(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Each of 2N rows against the 2N - 1 others."""
    rows = F.normalize(torch.cat([x, y]), dim=-1)
    logits = (rows @ rows.T / temperature).masked_fill(torch.eye(2 * N, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * N).roll(N))


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_nt_xent_of_all_ranks_is_the_global_one(world_size: int, chunk: int) -> None:
    leaf = features()

    def work(comm: ThreadComm) -> Tensor:
        part = leaf.chunk(world_size, dim=1)[comm.rank]
        return online_to_online(part, 0.1, comm, chunk=chunk)

    loss = torch.stack(run_threads(world_size, work)).mean()
    expected = dense_nt_xent(leaf[0], leaf[1], 0.1)
    torch.testing.assert_close(loss, expected)
    (gradient,), (wanted,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)
    with pytest.raises(AssertionError):  # the twin: another temperature
        torch.testing.assert_close(loss, dense_nt_xent(leaf[0], leaf[1], 0.11))


def test_release_pairs_view_1_with_itself() -> None:
    leaf = features()
    released = online_to_online(leaf, 0.1, SingleProcess(), pairs_views=False)
    (gradient,) = torch.autograd.grad(released, leaf)
    assert (gradient[1] == 0).all() and gradient[0].abs().sum() > 0
    assert released < online_to_online(leaf, 0.1, SingleProcess(), pairs_views=True)
    (paper,) = torch.autograd.grad(online_to_online(leaf, 0.1, SingleProcess()), leaf)
    assert paper[1].abs().sum() > 0


def test_needs_two_views() -> None:
    with pytest.raises(ValueError, match="2 views, not 1"):
        online_to_online(features(1), 0.1, SingleProcess())


def test_online_to_ema() -> None:
    predictions, target = features(), torch.randn(N, P, requires_grad=True)
    loss = online_to_ema(predictions, target)
    expected = (2 - 2 * F.cosine_similarity(predictions, target.detach()[None], dim=-1)).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert target.grad is None and predictions.grad is not None
    assert online_to_ema(target.detach()[None] * 3, target).item() == pytest.approx(0, abs=1e-6)
    assert online_to_ema(-target.detach()[None], target).item() == pytest.approx(4, abs=1e-6)
