"""The image-text losses on a ring of ranks: the texts travel, and each tile of logits is made once a pass.

A tile is one rank's images against one rank's texts. It gives both directions of InfoNCE: its rows belong to the images
here, its columns to texts whose sums travel with them. Logits and their gradients never exist but for one tile (or
`chunk` rows of it), in the backward pass again, and what autograd keeps is this rank's own features and two numbers a
sample: memory does not grow with the number of ranks.

Values are means over this rank's rows; the mean over ranks of the gradients is the gradient of the global loss.
Shapes: V views, B samples of this rank, E embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import Comm


def info_nce(images_VBE: Tensor, texts_BE: Tensor, scale: Tensor, comm: Comm, chunk: int = 0) -> Tensor:
    """contrastive.info_nce, the same within rounding. Collective: every rank must call, forward and backward."""
    return _InfoNCE.apply(images_VBE, texts_BE, scale, comm, chunk)


def sigmoid(images_VBE: Tensor, texts_BE: Tensor, scale: Tensor, bias: Tensor, comm: Comm, chunk: int = 0) -> Tensor:
    """sigmoid.sigmoid, the same within rounding. Collective: every rank must call, forward and backward."""
    return _Sigmoid.apply(images_VBE, texts_BE, scale, bias, comm, chunk)


def _pieces(images_VBE: Tensor, chunk: int) -> Iterator[tuple[int, slice]]:
    """(view, rows) of every piece of a tile."""
    V, B, _ = images_VBE.shape
    for view in range(V):
        for start in range(0, B, chunk or B):
            yield view, slice(start, min(start + (chunk or B), B))


def _matching(tile: Tensor, rows: slice) -> Tensor:
    """The places of a piece of this rank's own tile where a row meets its text; writing to it changes the tile."""
    return tile.diagonal(offset=rows.start)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, comm: Comm, chunk: int) -> Tensor:
        V, B, _ = images.shape
        row_sums = images.new_full((V, B), -torch.inf)  # log sum exp over all texts, of the images here
        column_sums = row_sums.clone()  # over the images met so far, of the texts held
        held = texts
        for shift in range(comm.world_size):
            coming = comm.ring_ahead(held) if shift + 1 < comm.world_size else None
            for view, rows in _pieces(images, chunk):
                logits = scale * (images[view, rows] @ held.T)
                row_sums[view, rows] = torch.logaddexp(row_sums[view, rows], logits.logsumexp(1))
                column_sums[view] = torch.logaddexp(column_sums[view], logits.logsumexp(0))
            column_sums = comm.ring_shift(column_sums)  # after the last tile they are home
            held = coming() if coming is not None else held
        own = scale * (images * texts).sum(-1)
        ctx.save_for_backward(images, texts, scale, row_sums, column_sums)
        ctx.comm, ctx.chunk = comm, chunk
        return (row_sums + column_sums - 2 * own).mean() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, texts, scale, row_sums, column_sums = ctx.saved_tensors
        comm, (V, B, _) = ctx.comm, images.shape
        share = grad / (2 * V * B)
        images_grad, scale_grad = torch.zeros_like(images), torch.zeros_like(scale)
        texts_grad = torch.zeros_like(texts)  # of the texts held; it travels with them
        held, theirs = texts, torch.cat([column_sums, share.expand(1, B)])  # theirs: of the rank that the texts are of
        for shift in range(comm.world_size):
            is_last = shift + 1 == comm.world_size
            coming = None if is_last else (comm.ring_ahead(held), comm.ring_ahead(theirs))
            for view, rows in _pieces(images, ctx.chunk):
                products = images[view, rows] @ held.T
                logits = scale * products
                tile = (logits - row_sums[view, rows, None]).exp_().mul_(share)
                tile += (logits - theirs[view]).exp_().mul_(theirs[V])
                if shift == 0:
                    _matching(tile, rows).sub_(2 * share)
                images_grad[view, rows] += scale * (tile @ held)
                texts_grad += scale * (tile.T @ images[view, rows])
                scale_grad += (tile * products).sum()
            texts_grad = comm.ring_shift(texts_grad)
            if coming is not None:
                held, theirs = (arrived() for arrived in coming)
        return images_grad, texts_grad, scale_grad, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, comm: Comm, chunk: int) -> Tensor:
        V, B, _ = images.shape
        total = images.new_zeros(())
        held = texts
        for shift in range(comm.world_size):
            coming = comm.ring_ahead(held) if shift + 1 < comm.world_size else None
            for view, rows in _pieces(images, chunk):
                logits = scale * (images[view, rows] @ held.T) + bias
                if shift == 0:
                    total -= _matching(logits, rows).sum()  # softplus(-z) = softplus(z) - z
                total += F.softplus(logits).sum()
            held = coming() if coming is not None else held
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.comm, ctx.chunk = comm, chunk
        return total / (V * B)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, texts, scale, bias = ctx.saved_tensors
        comm, (V, B, _) = ctx.comm, images.shape
        share = grad / (V * B)
        images_grad, texts_grad = torch.zeros_like(images), torch.zeros_like(texts)
        scale_grad, bias_grad = torch.zeros_like(scale), torch.zeros_like(bias)
        held = texts
        for shift in range(comm.world_size):
            coming = comm.ring_ahead(held) if shift + 1 < comm.world_size else None
            for view, rows in _pieces(images, ctx.chunk):
                products = images[view, rows] @ held.T
                tile = (scale * products).add_(bias).sigmoid_()
                if shift == 0:
                    _matching(tile, rows).sub_(1)
                tile.mul_(share)
                images_grad[view, rows] += scale * (tile @ held)
                texts_grad += scale * (tile.T @ images[view, rows])
                scale_grad += (tile * products).sum()
                bias_grad += tile.sum()
            texts_grad = comm.ring_shift(texts_grad)
            held = coming() if coming is not None else held
        return images_grad, texts_grad, scale_grad, bias_grad, None, None
