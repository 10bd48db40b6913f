"""The training losses and their settings.

contrastive.py and self_supervised.py have the terms, total.py sums them. Every module but this one is imported where it
is used, since the settings below are read by every command.
"""

from dataclasses import dataclass


@dataclass
class LossConfig:
    kind: str = "softmax"
    """softmax: CLIP's InfoNCE | sigmoid: SigLIP's pairwise loss (adds a learned logit_bias)."""
    contrastive_weight: float = 1.0
    """Weight of the mean over views of the image-text loss."""
    o2o_weight: float = 1.0
    """Weight of the online-to-online loss (SimCLR between the two views); 0 leaves its head out."""
    o2e_weight: float = 2.0
    """Weight of the online-to-EMA loss (BYOL against the teacher); 0 leaves its head out."""
    o2o_temperature: float = 0.1
    """Temperature of the online-to-online loss."""
    chunk: int = 0
    """Rows of logits held at a time by the softmax loss, forward and backward; 0: all rows at once."""

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "sigmoid"):
            raise ValueError(f"loss.kind: {self.kind!r} is neither softmax nor sigmoid")
        for key in ("contrastive_weight", "o2o_weight", "o2e_weight", "chunk"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key}: {getattr(self, key)} must be 0 or more")
        if self.o2o_temperature <= 0:
            raise ValueError(f"loss.o2o_temperature: {self.o2o_temperature} must be positive")
