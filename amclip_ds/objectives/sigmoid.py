"""SigLIP's image-text loss: pairwise sigmoids, the texts travelling round a ring of ranks.

A mean over this rank's rows; the mean over ranks of its gradients is the gradient of the global loss.
Shapes: V views, B samples of this rank, E embedding.
"""

import math

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclip_ds.comm import Comm
from amclip_ds.model.features import Features, Terms
from amclip_ds.objectives import contrastive, ring
from amclip_ds.objectives.base import Objective


class Sigmoid(Objective):
    """The mean over views of the pairwise loss between the views and the texts; adds a learned logit_bias."""

    Options = contrastive.Options
    features = frozenset({"image_embeds", "text_embeds", "logit_bias"})
    logit_scale = math.log(10.0)

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        images, texts = features.image_embeds, features.text_embeds
        assert images is not None and texts is not None
        assert features.logit_scale is not None and features.logit_bias is not None
        loss = ring.sigmoid if self.options.exchange == "ring" else sigmoid
        scale, bias = features.logit_scale, features.logit_bias
        return {"contrastive": loss(images, texts, scale, bias, comm, self.options.chunk)}


def sigmoid(images_VBE: Tensor, texts_BE: Tensor, scale: Tensor, bias: Tensor, comm: Comm, chunk: int = 0) -> Tensor:
    """SigLIP: mean over views and rows of the summed pairwise -log sigmoid(+-(scale * x . y + bias)).

    The texts travel round the ring of ranks; the logits against each rank's are formed again in the backward pass, so
    that their memory does not grow with the world (the texts', [B, E] a rank, does). Collective: every rank must call.
    chunk: rows of logits held at a time, forward and backward; 0: this rank's images against one rank's texts.
    """
    V, B, _ = images_VBE.shape
    total = texts_BE.new_zeros(())
    texts = texts_BE
    for shift in range(comm.world_size):
        for images in images_VBE:
            total = total + _sigmoid_against(images, texts, scale, bias, matching=shift == 0, chunk=chunk)
        if shift + 1 < comm.world_size:
            texts = comm.ring_shift(texts)
    return total / (V * B)


def _sigmoid_against(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, matching: bool, chunk: int) -> Tensor:
    """The sum over one rank's texts. matching: row i belongs to text i."""
    total = images.new_zeros(())
    rows_at_a_time = chunk or images.shape[0]
    for start in range(0, images.shape[0], rows_at_a_time):
        first = start if matching else None
        rows = images[start : start + rows_at_a_time]
        total = total + checkpoint(
            _summed_sigmoid, rows, texts, scale, bias, first, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _summed_sigmoid(rows: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first_match: int | None) -> Tensor:
    """first_match: the text that belongs to rows[0], the next to rows[1] and so on; None: none belongs."""
    logits = scale * (rows @ texts.T) + bias
    all_apart = F.softplus(logits).sum()
    if first_match is None:
        return all_apart
    return all_apart - logits.diagonal(offset=first_match).sum()  # softplus(-z) = softplus(z) - z
