"""CLIP's image-text loss: InfoNCE over all ranks' samples, whole or in chunks.

Every loss is a mean over this rank's rows; the mean over ranks of its gradients is the gradient of the global loss.
Shapes: V views, B samples of this rank, W ranks, E embedding, R rows, C columns.
"""

from dataclasses import dataclass

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

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        assert features.image_embeds is not None and features.text_embeds is not None
        assert features.logit_scale is not None
        images, texts, scale = features.image_embeds, features.text_embeds, features.logit_scale
        options = self.options
        if options.exchange == "ring" and options.gathers_gradient:
            return {"contrastive": ring.info_nce(images, texts, scale, comm, options.chunk)}
        return {"contrastive": info_nce(images, texts, scale, comm, options.chunk, options.gathers_gradient)}


def info_nce(
    images_VBE: Tensor, texts_BE: Tensor, scale: Tensor, comm: Comm, chunk: int = 0, gathers_gradient: bool = True
) -> Tensor:
    """Mean over views and both directions of the cross-entropy against all ranks' samples.

    Collective: every rank must call. chunk: rows of logits held at a time, forward and backward; 0: all.
    gathers_gradient: Options.
    """
    V, B, _ = images_VBE.shape
    is_cut = comm.world_size > 1 and not gathers_gradient
    columns_VBE, columns_BE = (images_VBE.detach(), texts_BE.detach()) if is_cut else (images_VBE, texts_BE)
    all_images = comm.all_gather(columns_VBE.transpose(0, 1).contiguous()).transpose(0, 1)  # [V, W * B, E]
    all_texts = comm.all_gather(columns_BE)
    labels = comm.rank * B + torch.arange(B, device=texts_BE.device)
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
