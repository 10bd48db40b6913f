"""The text tower: transformers' CLIP text transformer, pooled at the first end token."""

from dataclasses import dataclass


@dataclass
class TextConfig:
    width: int = 512
    """Channels of a token."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    context_length: int = 77
    """Longest text in tokens, start and end token included."""
    vocab_size: int = 49408
    """Number of token ids (CLIP's byte-pair encoding: 49408)."""
    eos_token_id: int = 49407
    """The end token; the feature is read at its first place."""
    activation: str = "quick_gelu"
    """quick_gelu (CLIP's, x * sigmoid(1.702 x)) | gelu (exact)."""
    checkpoint_every: int = 0
    """Recompute every n-th block in the backward pass instead of storing its activations; 0: none, 1: all."""

    def __post_init__(self) -> None:
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"model.text.activation: {self.activation!r} is neither quick_gelu nor gelu")
        if self.width % self.heads:
            raise ValueError(f"model.text.heads: {self.heads} does not divide model.text.width {self.width}")
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(f"model.text.eos_token_id: {self.eos_token_id} is outside the vocabulary")
        if self.checkpoint_every < 0:
            raise ValueError(f"model.text.checkpoint_every: {self.checkpoint_every} must be 0 or more")
        if self.context_length < 3:
            raise ValueError(f"model.text.context_length: {self.context_length} must be at least 3")
