"""What one rank trains on in one step.

Shapes: V views, B this rank's samples, H the side of a view, h of the teacher's crop, T tokens of the longest text.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from amclip_ds.data.photometric import Photometric
from amclip_ds.host_copies import upload


@dataclass
class Batch:
    """A rank's slice of the global batch, made on the CPU; `to` moves the tensors."""

    views_uint8: Tensor
    """[V, B, 3, H, H] crops, before photometric changes; in memory a pixel's colours are beside each other"""
    teacher_uint8: Tensor | None
    """[B, 3, h, h], never photometrically changed, in memory like the views; None where there is no teacher"""
    boxes: Tensor
    """[V + 1, B, 4] float32: top, left, height, width in source pixels; the last row is the teacher's"""
    photometric: Photometric
    """what to change, per view and sample; stays on the CPU"""
    mask_noise: Tensor
    """[V, B, U] float32 in [0, 1), keyed by sample: one number a unit of tokens"""
    token_ids: Tensor
    """[B, T] int64"""
    sample_ids: Tensor
    """[B] int64: place in the index; the same sample has the same id in every epoch and world"""
    epoch: int
    cursor: dict[str, Any]
    """where the stream is AFTER this batch: {"epoch", "step"} in global batches"""
    flips: Tensor | None = None
    """[V, B] bool: the views that were mirrored after the crop; None where no view is ever"""
    mask_noise2: Tensor | None = None
    """[V, B, U] a second draw; None where no mask reads it"""
    masked_ids: Tensor | None = None
    """[B, T'] int64: the texts as data.text_mask shortens them; None where it does not"""
    cloze_ids: Tensor | None = None
    """[B, T] int64: token_ids with some words hidden (masks/text/cloze.py); None where no objective reads them"""
    incidents: list[dict[str, str]] = field(default_factory=list)
    """what was skipped to make this batch: kind, shard, key, cause"""
    read_bytes: int = 0
    text_lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """plain, masked, cloze -> tokens of each text, from start to end token, as far as they are known"""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        moved: dict[str, Any] = {name: upload(value, device) for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Those that `to` moves, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
