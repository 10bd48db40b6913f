"""The student: both towers, the projections, the heads and the logit scale, behind one forward."""

from dataclasses import dataclass, field

from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The image tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    embed_dim: int = 512
    """Width of the shared embedding of images and texts."""
    init_from: str | None = None
    """A checkpoint, run or safetensors file whose weights replace the random start; none: random."""

    def __post_init__(self) -> None:
        if self.embed_dim < 1:
            raise ValueError(f"model.embed_dim: {self.embed_dim} must be at least 1")
