"""Which exact savings a model's forward makes: the keys of `engine.savings`. Loads no torch.

Each leaves out work of which nothing is read: features and gradients are those of the plain forward up to rounding.
"""

from dataclasses import dataclass


@dataclass
class Savings:
    last_block: bool = True
    """A tower's last block is computed for the pooled token alone, where nothing reads the others."""
    patchify: bool = True
    """Patches are cut out and multiplied as one matrix, those that stay alone (unless the mask reads embeddings)."""
    one_write: bool = True
    """With patchify: class token, kept patches and their positions are written at once, instead of joined later."""
    texts_by_length: bool = True
    """Texts of like length are taken together, each group padded to its own longest text. Not at ZeRO-3 on
    several ranks, where all must take as many."""
    teacher_inference: bool = True
    """The teacher looks in torch's inference mode (where it is not sharded), which keeps no record for autograd."""


PLAIN = Savings(False, False, False, False, False)
"""No saving: what the others are held against."""
