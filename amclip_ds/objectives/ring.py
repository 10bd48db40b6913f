"""The losses with negatives on a ring of ranks: the texts travel, and each tile of logits is made once a pass.

A tile is one rank's images against one rank's texts (of NT-Xent: one rank's views against another's). It gives both
directions of InfoNCE: its rows belong to the images here, its columns to texts whose sums travel with them. Logits and
their gradients never exist but for one tile (or `chunk` rows of it), in the backward pass again; what autograd keeps
is this rank's own features and two numbers a sample: memory does not grow with the number of ranks.

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


def online_to_online(features_VBP: Tensor, temperature: float, comm: Comm, chunk: int = 0) -> Tensor:
    """simclr.online_to_online between the two views, the same within rounding. Collective, forward and backward."""
    if features_VBP.shape[0] != 2:
        raise ValueError(f"loss.o2o_weight: this loss needs 2 views, not {features_VBP.shape[0]}")
    return _NTXent.apply(F.normalize(features_VBP.float(), dim=-1).flatten(0, 1), temperature, comm, chunk)


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


class _NTXent(torch.autograd.Function):
    """Rows are both views of this rank; what travels is both views of another, whose rows are its own affair."""

    @staticmethod
    def forward(ctx: Any, rows_NP: Tensor, temperature: float, comm: Comm, chunk: int) -> Tensor:
        N = rows_NP.shape[0]
        sums = rows_NP.new_full((N,), -torch.inf)  # log sum exp over all rows but itself
        held = rows_NP
        for shift in range(comm.world_size):
            coming = comm.ring_ahead(held) if shift + 1 < comm.world_size else None
            for _, rows in _pieces(rows_NP[None], chunk):
                logits = rows_NP[rows] @ held.T / temperature
                if shift == 0:
                    _matching(logits, rows).fill_(-torch.inf)
                sums[rows] = torch.logaddexp(sums[rows], logits.logsumexp(1))
            held = coming() if coming is not None else held
        partners = (rows_NP * rows_NP.roll(N // 2, 0)).sum(-1) / temperature
        ctx.save_for_backward(rows_NP, sums)
        ctx.temperature, ctx.comm, ctx.chunk = temperature, comm, chunk
        return (sums - partners).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows_NP, sums = ctx.saved_tensors
        comm, N = ctx.comm, rows_NP.shape[0]
        share = grad / (N * ctx.temperature)
        rows_grad = rows_NP.roll(N // 2, 0) * (-2 * share)  # a pair's product is in both its rows
        held_grad = torch.zeros_like(rows_NP)
        held = rows_NP
        for shift in range(comm.world_size):
            coming = comm.ring_ahead(held) if shift + 1 < comm.world_size else None
            for _, rows in _pieces(rows_NP[None], ctx.chunk):
                tile = (rows_NP[rows] @ held.T).div_(ctx.temperature).sub_(sums[rows, None]).exp_().mul_(share)
                if shift == 0:
                    _matching(tile, rows).zero_()
                rows_grad[rows] += tile @ held
                held_grad += tile.T @ rows_NP[rows]
            held_grad = comm.ring_shift(held_grad)
            held = coming() if coming is not None else held
        return rows_grad + held_grad, None, None, None
