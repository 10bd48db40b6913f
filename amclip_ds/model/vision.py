"""The vision tower: a timm ViT that can drop tokens between patch embedding and blocks, and score its patches."""

from dataclasses import dataclass


@dataclass
class VisionConfig:
    name: str = "vit_base_patch16_224"
    """Any timm ViT with a class token and no register tokens (vit_small_patch16_224, vit_huge_patch14_224, ...)."""
    image_size: int = 224
    """Side of the training images in pixels; the patch size must divide it."""
    patch_size: int | None = None
    """Side of a patch in pixels; none: what the name says."""
    width: int | None = None
    """Channels of a token; none: what the name says."""
    depth: int | None = None
    """Number of blocks; none: what the name says."""
    heads: int | None = None
    """Attention heads; none: what the name says (the paper's S/16 has 12, timm's 6)."""
    mlp_ratio: float | None = None
    """Hidden width of the MLP over the width; none: what the name says."""
    freeze_patch_embed: bool = True
    """The patch embedding stays at its random initialisation (as published) and has no backward pass."""
    position_init: str = "normal"
    """normal: truncated normal 0.02 | sincos: 0.3 x the 2-D sine-cosine table (learns faster at tiny sizes)."""
    checkpoint_every: int = 0
    """Recompute every n-th block in the backward pass instead of storing its activations; 0: none, 1: all."""

    def __post_init__(self) -> None:
        if self.position_init not in ("normal", "sincos"):
            raise ValueError(f"model.vision.position_init: {self.position_init!r} is neither normal nor sincos")
        if self.checkpoint_every < 0:
            raise ValueError(f"model.vision.checkpoint_every: {self.checkpoint_every} must be 0 or more")
        for key in ("image_size", "patch_size", "width", "depth", "heads", "mlp_ratio"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"model.vision.{key}: {value} must be positive")
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"model.vision.heads: {self.heads} does not divide model.vision.width {self.width}")
