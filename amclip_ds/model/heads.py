"""The self-supervised heads on the CLS feature: online-to-online (SimCLR) and online-to-EMA (BYOL)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from amclip_ds.model.batch_norm import BatchNorm


@dataclass
class HeadsConfig:
    norm: str = "batch"
    """batch: statistics over all ranks, as in the paper | layer: no communication, for very large worlds."""
    hidden_dim: int = 4096
    """Width of the hidden layers."""
    output_dim: int = 256
    """Width of what the self-supervised losses compare."""
    norm_momentum: float = 0.1
    """How fast the running statistics of batch norm follow the batches (read only in evaluation mode)."""

    def __post_init__(self) -> None:
        if self.norm not in ("batch", "layer"):
            raise ValueError(f"heads.norm: {self.norm!r} is neither batch nor layer")
        for key in ("hidden_dim", "output_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"heads.{key}: {getattr(self, key)} must be at least 1")
        if not 0.0 < self.norm_momentum <= 1.0:
            raise ValueError(f"heads.norm_momentum: {self.norm_momentum} is outside (0, 1]")


class MLPHead(nn.Module):
    """Linear, norm, ReLU, ..., Linear: one head, `layers` numbered as in an nn.Sequential."""

    def __init__(self, widths: list[int], config: HeadsConfig, bias: bool) -> None:
        """widths: input, hidden ..., output."""
        super().__init__()
        self.layers = nn.ModuleList()
        for before, after in zip(widths[:-2], widths[1:-1]):
            norm = BatchNorm(after, config.norm_momentum) if config.norm == "batch" else nn.LayerNorm(after)
            self.layers.extend([nn.Linear(before, after, bias=bias), norm, nn.ReLU()])
        self.layers.append(nn.Linear(widths[-2], widths[-1], bias=bias))

    def forward(self, x: Tensor, all_reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, in] -> [B, out]. Collective with batch norm: every rank must call."""
        for layer in self.layers:
            x = layer(x, all_reduce_sum) if isinstance(layer, BatchNorm) else layer(x)
        return x


def build_o2o(width: int, config: HeadsConfig) -> MLPHead:
    return MLPHead([width, config.hidden_dim, config.hidden_dim, config.output_dim], config, bias=True)


def build_o2e_projector(width: int, config: HeadsConfig) -> MLPHead:
    return MLPHead([width, config.hidden_dim, config.output_dim], config, bias=False)


def build_o2e_predictor(config: HeadsConfig) -> MLPHead:
    return MLPHead([config.output_dim, config.hidden_dim, config.output_dim], config, bias=False)
