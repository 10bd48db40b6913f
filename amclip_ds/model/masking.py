"""Which patch tokens stay: strategies that return keep_indices, and the module that removes the others.

Shapes: B batch (all views of it), N patches, K kept, U units (blocks of unit x unit patches), D width.
"""

from dataclasses import dataclass


@dataclass
class MaskConfig:
    strategy: str = "attentive"
    """none | random | attentive | attentive_inverse (removes what the teacher attends to: the paper's ablation)."""
    keep_ratio: float = 0.5
    """Fraction of the patch tokens kept, in (0, 1]. At 0.5 a 14 x 14 grid with unit 2 keeps 100 of 196 tokens."""
    unit: int = 2
    """Side of the block of tokens kept or removed together; must divide the patch grid."""

    def __post_init__(self) -> None:
        names = ("none", "random", "attentive", "attentive_inverse")
        if self.strategy not in names:
            raise ValueError(f"mask.strategy: {self.strategy!r} is none of {', '.join(names)}")
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(f"mask.keep_ratio: {self.keep_ratio} is outside (0, 1]")
        if self.unit < 1:
            raise ValueError(f"mask.unit: {self.unit} must be at least 1")
