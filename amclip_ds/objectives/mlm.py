"""Masked words: some tokens of a caption are hidden from the text tower, and a small decoder predicts which they were.

MaskCLIP's text loss (arXiv 2208.12262, from the paper's description: its code was never released). The text tower reads
the captions once more, with one learned embedding at the hidden places (masks/text/cloze.py); the decoder sees all of a
text's tokens, and its logits are products with the embeddings of the vocabulary.
Shapes: B samples, T tokens of a text, H hidden places, W width, Y vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amclip_ds.masks.text.cloze import num_hidden
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import MLMOptions
from amclip_ds.model.features import Features, Terms
from amclip_ds.model.init import normal
from amclip_ds.objectives.base import Objective

HEAD_WIDTH, MLP_RATIO, EPSILON = 64, 4.0, 1e-5
ROWS = 256  # of logits [ROWS, Y] held at a time, forward and backward


class MLM(Objective):
    """Cross-entropy of the hidden words, the mean over those of a text, then over texts; a text without words has 0."""

    Options = MLMOptions
    features = frozenset({"tokens", "vocabulary"})
    text = "cloze"
    init = {r"hidden_word\.weight": normal(0.02)}

    def __init__(self, options: Any, sizes: Sizes) -> None:
        from timm.models.vision_transformer import Block

        super().__init__(options, sizes)
        width = sizes.text_width
        heads = max(1, width // HEAD_WIDTH)
        heads = heads if width % heads == 0 else 1
        self.hidden_word = nn.Embedding(1, width)
        self.blocks = nn.ModuleList(Block(width, heads, MLP_RATIO, qkv_bias=True) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def hidden(self) -> Tensor:
        """What the text tower reads at hidden places, [W]; by the layer's forward, where ZeRO-3 gathers it."""
        weight: Any = self.hidden_word.weight
        return self.hidden_word(torch.zeros(1, dtype=torch.long, device=weight.device))[0]

    def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
        ids_BT, x_BTW, vocabulary_YW = features.token_ids, features.tokens, features.vocabulary
        assert ids_BT is not None and x_BTW is not None and vocabulary_YW is not None
        seen = in_text(ids_BT)[:, None, None]
        for block in self.blocks:
            x_BTW = block(x_BTW, attn_mask=seen)
        places_BH, is_hidden_BH = hidden_places(ids_BT, self.options.share)
        rows = self.norm(x_BTW.take_along_dim(places_BH[..., None], 1)).flatten(0, 1)
        words = (~ids_BT).gather(1, places_BH).clamp(min=0).flatten()
        errors = [
            checkpoint(cross_entropy, *part, vocabulary_YW, use_reentrant=False, preserve_rng_state=False)
            for part in zip(rows.split(ROWS), words.split(ROWS))
        ]
        errors_BH = torch.cat(errors).view_as(is_hidden_BH) * is_hidden_BH
        return {"mlm": (errors_BH.sum(1) / is_hidden_BH.sum(1).clamp(min=1)).mean()}


def in_text(ids_BT: Tensor) -> Tensor:
    """[B, T]: whether a place is one of the text's, up to its end token, which is not 0 as what follows it is."""
    columns = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)
    return columns <= ((ids_BT != 0) * columns).amax(dim=1, keepdim=True)


def hidden_places(ids_BT: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """[B, H] the hidden places of each text, ascending, filled up with others; and [B, H] which are hidden."""
    is_hidden = (ids_BT < 0).to(torch.int8)
    most = num_hidden(ids_BT.shape[1] - 2, share)
    places = is_hidden.sort(dim=1, descending=True, stable=True).indices[:, :most]
    return places, is_hidden.gather(1, places)


def cross_entropy(rows: Tensor, words: Tensor, vocabulary: Tensor) -> Tensor:
    """Of each row [H, W] against its word, fp32 [H]."""
    return F.cross_entropy(F.linear(rows, vocabulary).float(), words, reduction="none")
