"""What a model is worth: zero-shot classification, retrieval, linear probe and k-NN, in CLIP_benchmark's words.

datasets.py reads the folders, encoder.py runs a model over them with all ranks sharing the work, metrics.py counts.
Every module but this one is imported where it is used, since the settings below are read by every command.
"""

from dataclasses import dataclass


@dataclass
class EvalConfig:
    """Evaluation during training."""

    data: str | None = None
    """Folders to evaluate on, joined by `::`: CLIP_benchmark's layout (classnames.txt, test/0.tar, ...), an image
    folder (a folder a class, wnids too; below `val` or not), or tars of pairs for retrieval; null: none."""
    every_steps: int | None = None
    """Evaluate every so many steps; null: after the last step alone."""
    batch_size: int = 64
    """Images, or texts, in one forward; the numbers do not depend on how many ranks share the batches."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size: {self.batch_size} is below 1")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"eval.every_steps: {self.every_steps} is below 1 (null: after the last step alone)")
