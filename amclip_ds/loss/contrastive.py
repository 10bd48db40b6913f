"""The image-text losses: CLIP's InfoNCE (whole or in chunks) and SigLIP's sigmoid (round a ring).

Every loss is a mean over this rank's rows; the mean over ranks of its gradients is the gradient of the global loss.
Shapes: V views, B samples of this rank, W ranks, E embedding, R rows, C columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclip_ds.loss.comm import Comm


def info_nce(images_VBE: Tensor, texts_BE: Tensor, scale: Tensor, comm: Comm, chunk: int = 0) -> Tensor:
    """Mean over views and both directions of the cross-entropy against all ranks' samples.

    Collective: every rank must call. chunk: rows of logits held at a time, forward and backward; 0: all.
    """
    V, B, _ = images_VBE.shape
    all_images = comm.all_gather(images_VBE.transpose(0, 1).contiguous()).transpose(0, 1)  # [V, W * B, E]
    all_texts = comm.all_gather(texts_BE)
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
