"""The self-supervised heads on the CLS feature: online-to-online (SimCLR) and online-to-EMA (BYOL)."""

from dataclasses import dataclass


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
