from collections.abc import Callable

import pytest
import torch
from torch import nn

from amclip_ds.comm import SingleProcess
from amclip_ds.model.amclip import AClip
from amclip_ds.model.batch_norm import BatchNorm
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig
from amclip_ds.model.heads import MLPHead
from amclip_ds.objectives import builder, chosen
from tests.unit.thread_ranks import ThreadComm, run_threads

one_rank = SingleProcess().all_reduce_sum


def normed(
    norm: BatchNorm, x: torch.Tensor, all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] = one_rank
) -> torch.Tensor:
    sums = norm.sums(x)
    return norm(x, None if sums is None else all_reduce_sum(sums))


def trained_pair() -> tuple[BatchNorm, nn.BatchNorm1d]:
    ours, torchs = BatchNorm(6), nn.BatchNorm1d(6)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.copy_(torch.randn(6))
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def test_equals_torch_on_one_rank() -> None:
    ours, torchs = trained_pair()
    for _ in range(3):
        x = (torch.randn(10, 6) * 3 + 5).requires_grad_()
        y = x.detach().clone().requires_grad_()
        a, b = normed(ours, x), torchs(y)
        torch.testing.assert_close(a, b)
        (a * torch.arange(6.0)).square().sum().backward()
        (b * torch.arange(6.0)).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)
    for (name, mine), theirs in zip(ours.named_parameters(), torchs.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-5, msg=name)
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    ours.eval(), torchs.eval()
    torch.testing.assert_close(normed(ours, x), torchs(x))


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_one_rank_regardless_of_the_world(world_size: int) -> None:
    x = (torch.randn(16, 6) * 2 + 30).double()
    weights = torch.randn(16, 6)

    def run(world: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(1)
        norm, _ = trained_pair()
        leaf = x.float().clone().requires_grad_()
        parts = leaf.chunk(world)
        norms = [norm] + [BatchNorm(6) for _ in range(world - 1)]
        for other in norms[1:]:
            other.load_state_dict(norm.state_dict())

        def rank_work(comm: ThreadComm) -> torch.Tensor:
            return normed(norms[comm.rank], parts[comm.rank], comm.all_reduce_sum)

        out = torch.cat(run_threads(world, rank_work))
        (out * weights).sum().backward()
        for other in norms[1:]:
            for name, buffer in norm.named_buffers():
                torch.testing.assert_close(other.get_buffer(name), buffer)
        grads = [leaf.grad, sum(n.weight.grad for n in norms), sum(n.bias.grad for n in norms)]
        return out.detach(), [*grads, norm.running_mean, norm.running_var]

    expected_out, expected = run(1)
    out, values = run(world_size)
    torch.testing.assert_close(out, expected_out)
    for ours, theirs in zip(values, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    def alone(comm: ThreadComm) -> torch.Tensor:  # the twin: every rank its own statistics
        return normed(BatchNorm(6), x.float().chunk(world_size)[comm.rank])

    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.cat(run_threads(world_size, alone)), expected_out)


def test_precise_where_rows_hardly_differ() -> None:
    """A mean 1,000 times the deviation: sums in fp32 would leave three digits."""
    x = torch.randn(64, 6, dtype=torch.float64) * 1e-3 + 1
    x = x.float()
    exact = (x.double() - x.double().mean(0)) / (x.double().var(0, correction=0) + 1e-5).sqrt()
    ours = normed(BatchNorm(6), x)
    torch.testing.assert_close(ours.double(), exact, atol=5e-5, rtol=0)
    squares = x.square().mean(0) - x.mean(0).square()
    with pytest.raises(AssertionError):
        in_fp32 = (x - x.mean(0)) * torch.rsqrt(squares + 1e-5)
        torch.testing.assert_close(in_fp32.double(), exact, atol=5e-5, rtol=0)


def test_bf16_in_bf16_out_with_fp32_statistics() -> None:
    norm = BatchNorm(6)
    norm.weight.data = norm.weight.data.bfloat16()
    norm.bias.data = norm.bias.data.bfloat16()
    x = torch.randn(8, 6, dtype=torch.bfloat16, requires_grad=True)
    out = normed(norm, x)
    assert out.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # what made it ours
        mixed = nn.BatchNorm1d(6)
        mixed.weight.data, mixed.bias.data = mixed.weight.data.bfloat16(), mixed.bias.data.bfloat16()
        mixed(x).sum().backward()


def test_a_batch_that_is_not_finite_leaves_the_statistics_alone() -> None:
    norm = BatchNorm(6)
    normed(norm, torch.randn(8, 6))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    bad = torch.randn(8, 6)
    bad[3, 2] = float("nan")
    assert normed(norm, bad).isnan().any()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    normed(norm, torch.randn(8, 6))
    assert norm.num_batches_tracked == 2 and not torch.equal(norm.running_mean, before["running_mean"])


def test_layer_norm_heads_need_no_other_rank() -> None:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a collective")

    x = torch.randn(4, 10)
    MLPHead([10, 8, 4], HeadsConfig(norm="layer"), bias=True)(x, refuse)
    with pytest.raises(AssertionError, match="a collective"):
        MLPHead([10, 8, 4], HeadsConfig(), bias=True)(x, refuse)


def test_layers_of_the_paper() -> None:
    with torch.device("meta"):
        objectives = AClip(ModelConfig(), builder(chosen(LossConfig(), HeadsConfig()))).objectives
    o2o, projector, predictor = objectives["simclr"].head, objectives["byol"].projector, objectives["byol"].predictor

    def linears(head: nn.Module) -> list[tuple[int, int, bool]]:
        return [(m.in_features, m.out_features, m.bias is not None) for m in head.modules() if isinstance(m, nn.Linear)]

    assert linears(o2o) == [(768, 4096, True), (4096, 4096, True), (4096, 256, True)]
    assert linears(projector) == [(768, 4096, False), (4096, 256, False)]
    assert linears(predictor) == [(256, 4096, False), (4096, 256, False)]
    assert [type(layer).__name__ for layer in projector.layers] == ["Linear", "BatchNorm", "ReLU", "Linear"]
