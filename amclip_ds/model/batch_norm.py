"""Batch norm over all ranks, in fp32 regardless of the model's dtype, on any device.

torch.nn.SyncBatchNorm refuses CPU tensors, and BatchNorm1d fails under a bf16 engine, whose buffers stay fp32.
"""

import torch
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Normalises each channel over the rows of all ranks. Parameter and buffer names are torch's."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def sums(self, x: Tensor) -> Tensor | None:
        """What the ranks add up before `forward`, with gradient: [1 + 2 C] fp64 of x [B, C]; None in evaluation."""
        if not self.training:
            return None
        # Sums in fp64: CLS features of a young model hardly differ between images, and in fp32 the difference of the
        # mean square and the squared mean then loses three digits (seen against the published code's gradients).
        x = x.double()
        count = x.new_full((1,), float(x.shape[0]))
        return torch.cat([count, x.sum(0), x.square().sum(0)])

    def forward(self, x: Tensor, total: Tensor | None) -> Tensor:
        """x [B, C] -> [B, C] in x's dtype. total: the sum over the ranks of `sums`; None: the running statistics."""
        x32 = x.float()
        if total is not None:
            mean, variance = self._batch_statistics(total)
        else:
            mean, variance = self.running_mean.float(), self.running_var.float()
        out = (x32 - mean) * torch.rsqrt(variance + self.eps) * self.weight.float() + self.bias.float()
        return out.to(x.dtype)

    def _batch_statistics(self, total: Tensor) -> tuple[Tensor, Tensor]:
        rows = total[0].detach()
        mean, mean_square = (total[1:] / rows).chunk(2)
        variance = (mean_square - mean.square()).clamp(min=0.0)
        self._update_running_stats(mean.detach(), variance.detach() * (rows / (rows - 1).clamp(min=1.0)))
        return mean.float(), variance.float()

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics, unless the batch is not finite: its step is skipped, they would stay NaN."""
        is_finite = torch.isfinite(mean + variance).all()
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(is_finite, running.lerp(batch.to(running.dtype), self.momentum), running))
        self.num_batches_tracked.add_(is_finite)
