import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.objectives.contrastive import cross_entropy, info_nce
from amclip_ds.objectives.sigmoid import sigmoid
from benchmarks.tensor_memory import TensorMemory
from tests.unit.thread_ranks import ThreadComm, run_threads

V, N, E = 2, 12, 8


def features(samples: int = N, width: int = E) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """images [V, N, E], texts [N, E], scale (1,), bias (1,): leaves that want gradients."""
    draw = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(V, samples, width, generator=draw), dim=-1).requires_grad_()
    texts = F.normalize(torch.randn(samples, width, generator=draw), dim=-1).requires_grad_()
    return images, texts, torch.tensor([8.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)


def dense_info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    losses = []
    for view in images:
        logits = scale * view @ texts.T
        labels = torch.arange(len(texts))
        losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    return torch.stack(losses).mean()


def dense_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    losses = []
    for view in images:
        logits = scale * view @ texts.T + bias
        signs = 2 * torch.eye(len(texts)) - 1
        losses.append(-F.logsigmoid(signs * logits).sum() / len(texts))
    return torch.stack(losses).mean()


def gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def over_ranks(world_size: int, kind: str, chunk: int, leaves: tuple[Tensor, ...], detach: bool = False) -> Tensor:
    """The mean over ranks of each rank's loss on its part: what averaging gradients over ranks differentiates."""
    images, texts, scale, bias = leaves

    def work(comm: ThreadComm) -> Tensor:
        if detach:
            comm._exchange, exchange = lambda x: [y.detach() for y in exchange(x)], comm._exchange  # type: ignore
        B = N // world_size
        part = slice(comm.rank * B, (comm.rank + 1) * B)
        if kind == "sigmoid":
            return sigmoid(images[:, part], texts[part], scale, bias, comm, chunk)
        return info_nce(images[:, part], texts[part], scale, comm, chunk)

    return torch.stack(run_threads(world_size, work)).mean()


@pytest.mark.parametrize("chunk", [0, 1, 5, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_info_nce_of_all_ranks_is_the_global_one(world_size: int, chunk: int) -> None:
    leaves = features()
    expected = dense_info_nce(*leaves[:3])
    loss = over_ranks(world_size, "softmax", chunk, leaves)
    torch.testing.assert_close(loss, expected)
    close(gradients(loss, leaves[:3]), gradients(expected, leaves[:3]))


def test_gathering_without_gradient_is_another_gradient() -> None:
    """The twin: a known defect of published CLIP losses."""
    leaves = features()
    loss = over_ranks(2, "softmax", 0, leaves, detach=True)
    expected = dense_info_nce(*leaves[:3])
    torch.testing.assert_close(loss, expected)
    with pytest.raises(AssertionError):
        close(gradients(loss, leaves[:2]), gradients(expected, leaves[:2]))


@pytest.mark.parametrize("chunk", [0, 2, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sigmoid_round_the_ring_is_the_dense_one(world_size: int, chunk: int) -> None:
    leaves = features()
    expected = dense_sigmoid(*leaves)
    loss = over_ranks(world_size, "sigmoid", chunk, leaves)
    torch.testing.assert_close(loss, expected)
    close(gradients(loss, leaves), gradients(expected, leaves))


def test_a_ring_that_has_stopped_fails() -> None:
    leaves = features()

    def work(comm: ThreadComm) -> Tensor:
        comm.ring_shift = lambda x: x  # type: ignore[method-assign]
        part = slice(comm.rank * 6, comm.rank * 6 + 6)
        return sigmoid(leaves[0][:, part], leaves[1][part], leaves[2], leaves[3], comm)

    loss = torch.stack(run_threads(2, work)).mean()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loss, dense_sigmoid(*leaves))


def test_excluded_columns_are_no_candidates() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(5, E, generator=draw), torch.randn(9, E, generator=draw)
    labels, excluded = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 6, 7, 8, 5])
    expected = torch.stack(
        [
            F.cross_entropy(
                (2.0 * rows[i] @ columns[[c for c in range(9) if c != excluded[i]]].T)[None], labels[i : i + 1]
            )
            for i in range(5)
        ]
    ).mean()
    for chunk in (0, 2):
        torch.testing.assert_close(cross_entropy(rows, columns, labels, 2.0, excluded, chunk), expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_falls_with_the_chunk_forward_and_backward(kind: str) -> None:
    samples, width = 1024, 16
    leaves = features(samples, width)
    whole_logits = samples * samples
    peaks, largest = [], []
    for chunk in (0, 256, 64):
        with TensorMemory() as memory:
            if kind == "softmax":
                loss = info_nce(*leaves[:3], SingleProcess(), chunk)
            else:
                loss = sigmoid(*leaves, SingleProcess(), chunk)
            gradients(loss, leaves[: 3 if kind == "softmax" else 4])
        peaks.append(memory.peak_bytes)
        largest.append(memory.largest_numel)
        del loss
    print(f"{kind}: peak MB at chunk 0, 256, 64: {[round(peak / 1e6, 2) for peak in peaks]}")
    assert largest[0] >= whole_logits and largest[1] == 256 * samples and largest[2] == 64 * samples
    assert peaks[1] < peaks[0] / 3 and peaks[2] < peaks[1] / 1.5


class FakeRing(SingleProcess):
    """As many ranks as are asked for, all with the same texts: each shift hands over a tensor of its own."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def ring_shift(self, x: Tensor) -> Tensor:
        return x.clone()


def saved_bytes(world_size: int, samples: int) -> int:
    """What autograd keeps of a sigmoid loss for its backward pass, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    leaves = features(samples)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sigmoid(*leaves, FakeRing(world_size))
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_the_ring_keeps_no_logits_however_many_ranks() -> None:
    samples = 256
    logits, texts = V * samples * samples * 4, samples * E * 4
    kept = {world: saved_bytes(world, samples) for world in (1, 4, 16)}
    print(f"bytes kept at 1, 4, 16 ranks: {kept}; one rank's logits: {logits}")
    assert kept[16] - kept[1] <= 2 * 15 * texts < logits
    assert kept[16] < logits
