"""Attentive: what the teacher attends to stays (A-CLIP, arXiv 2212.08653); inverse, the paper's ablation: it goes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskInputs


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.scores is not None
    return inputs.scores


def inverse(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.scores is not None
    return -inputs.scores
