"""CLIP's image-text loss: InfoNCE over all ranks' samples, whole or in chunks.

Every loss is a mean over this rank's rows; the mean over ranks of its gradients is the gradient of the global loss.
Shapes: V views, B samples of this rank, W ranks, E embedding, R rows, C columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclip_ds.comm import Comm
from amclip_ds.model.features import Features, Terms
from amclip_ds.objectives import ring
from amclip_ds.objectives.base import Objective, Weighted


@dataclass
class Options(Weighted):
    chunk: int = 0
    """Rows of logits held at a time, forward and backward; 0: all."""
    text: str = "plain"
    """Which form of the texts it reads: plain | masked."""
    exchange: str = "gather"
    """gather | ring: loss.exchange."""
    gathers_gradient: bool = True
    """False: on several ranks the columns carry no gradient, as SLIP's published code (half of it is then missing)."""


class Contrastive(Objective):
    """The mean over views of InfoNCE between the views and the texts."""

    Options = Options
    features = frozenset({"image_embeds", "text_embeds"})
    compiled_parts = ("of_gathered",)

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        assert features.image_embeds is not None and features.text_embeds is not None
        assert features.logit_scale is not None
        images, texts, scale = features.image_embeds, features.text_embeds, features.logit_scale
        options = self.options
        if options.exchange == "ring" and options.gathers_gradient:
            return {"contrastive": ring.info_nce(images, texts, scale, comm, options.chunk)}
        others = gathered(images, texts, comm, options.gathers_gradient)
        of_gathered = info_nce_of_gathered if options.chunk else self.of_gathered
        return {"contrastive": of_gathered(images, texts, *others, scale, comm.rank, options.chunk)}

    def of_gathered(self, *given: Any) -> Tensor:
        """info_nce_of_gathered."""
        return info_nce_of_gathered(*given)


def info_nce(
    images_VBE: Tensor, texts_BE: Tensor, scale: Tensor, comm: Comm, chunk: int = 0, gathers_gradient: bool = True
) -> Tensor:
    """Mean over views and both directions of the cross-entropy against all ranks' samples.

    Collective: every rank must call. chunk: rows of logits held at a time, forward and backward; 0: all.
    gathers_gradient: Options.
    """
    others = gathered(images_VBE, texts_BE, comm, gathers_gradient)
    return info_nce_of_gathered(images_VBE, texts_BE, *others, scale, comm.rank, chunk)


def gathered(images_VBE: Tensor, texts_BE: Tensor, comm: Comm, gathers_gradient: bool) -> tuple[Tensor, Tensor]:
    """All ranks' images [V, W * B, E] and texts [W * B, E]. Collective: every rank must call."""
    is_cut = comm.world_size > 1 and not gathers_gradient
    columns_VBE, columns_BE = (images_VBE.detach(), texts_BE.detach()) if is_cut else (images_VBE, texts_BE)
    all_images = comm.all_gather(columns_VBE.transpose(0, 1).contiguous()).transpose(0, 1)
    return all_images, comm.all_gather(columns_BE)


def info_nce_of_gathered(
    images_VBE: Tensor, texts_BE: Tensor, all_images: Tensor, all_texts: Tensor, scale: Tensor, rank: int, chunk: int
) -> Tensor:
    """info_nce, with what the other ranks sent."""
    V, B, _ = images_VBE.shape
    labels = rank * B + torch.arange(B, device=texts_BE.device)
    total = texts_BE.new_zeros(())
    for images, columns in zip(images_VBE, all_images):
        total = total + cross_entropy(images, all_texts, labels, scale, chunk=chunk)
        total = total + cross_entropy(texts_BE, columns, labels, scale, chunk=chunk)
    return total / (2 * V)


def cross_entropy(
    rows_RE: Tensor,
    columns_CE: Tensor,
    labels_R: Tensor,
    scale: Tensor | float,
    excluded_R: Tensor | None = None,
    chunk: int = 0,
) -> Tensor:
    """Mean over rows of the cross-entropy of scale * rows @ columns^T at labels_R, in fp32.

    excluded_R: a column per row that is no candidate (itself). chunk: the [chunk, C] logits of so many rows exist at a
    time; they are formed again in the backward pass.
    """
    R = rows_RE.shape[0]
    if not chunk or chunk >= R:
        return _summed_cross_entropy(rows_RE, columns_CE, labels_R, scale, excluded_R) / R
    total = rows_RE.new_zeros(())
    for start in range(0, R, chunk):
        part = slice(start, start + chunk)
        excluded = None if excluded_R is None else excluded_R[part]
        total = total + checkpoint(
            _summed_cross_entropy,
            rows_RE[part],
            columns_CE,
            labels_R[part],
            scale,
            excluded,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / R


def _summed_cross_entropy(
    rows: Tensor, columns: Tensor, labels: Tensor, scale: Tensor | float, excluded: Tensor | None
) -> Tensor:
    logits = scale * (rows @ columns.T)
    if excluded is not None:
        logits = logits.scatter(1, excluded[:, None], float("-inf"))
    return F.cross_entropy(logits, labels, reduction="sum")
