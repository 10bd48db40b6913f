"""Both towers and their projections: what the student and the teacher have in common.

Shapes: B samples, V views, N patches of an image, T tokens, E embedding.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.masks.selection import Selection
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.savings import Savings
from amclip_ds.model.text import TextTower
from amclip_ds.model.vision import VisionTower


class TwoTowers(nn.Module):
    """Vision and text, each with its projection into the shared space."""

    def __init__(self, model: ModelConfig, savings: Savings | None) -> None:
        super().__init__()
        self.vision = VisionTower(model.vision, savings)
        self.text = TextTower(model.text, savings)
        self.image_projection = nn.Linear(self.vision.width, model.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, model.embed_dim, bias=False)

    def forward(self, method: Callable[..., Any], *inputs: Any) -> Any:
        """The engine's entry: `method` of this class over the inputs (an engine's hooks watch forward alone)."""
        return method(self, *inputs)

    def embed_images(self, images: Tensor, selections: tuple[Selection, ...] = ()) -> Tensor:
        """[B, 3, H, W] normalised -> embeddings [B, E], fp32 rows of unit length. selections choose the tokens that
        stay; none: every one."""
        output = self.vision(images, selections, cls_only=True)
        return normalise(self.image_projection(self.vision.feature(output.tokens)))

    def attention(self, images: Tensor) -> Tensor:
        """[B, N] fp32, of all views [V, B, N]: how much the class token attends to each patch. No objective is asked,
        and no statistic moves. images: [B, 3, H, W] normalised, or all views [V, B, 3, H, W]."""
        scores = self.vision(images.flatten(0, -4), with_scores=True).scores
        assert scores is not None
        return scores.unflatten(0, images.shape[:-3])

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> embeddings [B, E], fp32 rows of unit length."""
        return normalise(self.text_projection(self.text(token_ids)))


def normalise(x: Tensor) -> Tensor:
    """Rows of unit length, in fp32."""
    return F.normalize(x.float(), dim=-1)
