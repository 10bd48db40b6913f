"""What the losses read: the model's outputs of one batch.

Shapes: V views, B samples, E embedding, P output of the heads.
"""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """A tuple, not a dataclass: ZeRO-3 finds the tensors it must hook only in tuples, lists and dicts."""

    image_embeds: Tensor
    """[V, B, E] fp32, L2-normalised"""
    text_embeds: Tensor
    """[B, E] fp32, L2-normalised"""
    o2o: Tensor | None
    """[V, B, P]"""
    o2e: Tensor | None
    """[V, B, P]: predictor(projector(cls))"""
    logit_scale: Tensor
    """(1,) fp32, exp'ed"""
    logit_bias: Tensor | None
    """(1,) fp32, sigmoid loss only"""
