"""The ring's losses over real ranks (gloo), against the gathered ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.objectives import ring
from amclip_ds.objectives.contrastive import info_nce
from amclip_ds.objectives.sigmoid import sigmoid
from amclip_ds.objectives.simclr import online_to_online
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm

LOCAL, VIEWS, WIDTH = 5, 2, 6


def against_gather(chunk: int, wrong: bool = False) -> dict[str, float]:
    """The largest difference of values and of gradients (of the sum over ranks), by kind of loss, in fp64.

    wrong: the last rank keeps the first tile that comes and hands that on.
    """
    runtime = engine_runtime.start()
    comm = DistributedComm()
    draw = torch.Generator().manual_seed(comm.rank)
    images = F.normalize(torch.randn(VIEWS, LOCAL, WIDTH, generator=draw, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(LOCAL, WIDTH, generator=draw, dtype=torch.float64), dim=-1)
    scale, bias = torch.tensor([8.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)
    found = {}
    for kind, losses, given in (
        ("softmax", (ring.info_nce, info_nce), [images, texts, scale]),
        ("sigmoid", (ring.sigmoid, sigmoid), [images, texts, scale, bias]),
        ("nt_xent", (nt_xent_on_a_ring, nt_xent), [images, texts, scale]),
    ):
        theirs = differentiated(losses[1], given, comm, chunk)
        ours = differentiated(losses[0], given, StuckComm() if wrong and comm.rank == 7 else comm, chunk)
        found[kind] = max(float((one - other).abs().max()) for one, other in zip(ours, theirs))
    engine_runtime.stop(runtime)
    return found


class StuckComm(DistributedComm):
    """Takes part in every exchange, and keeps what it had."""

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        arrived = super().ring_ahead(x)
        return lambda: (arrived(), x)[1]


def nt_xent_on_a_ring(images: Tensor, texts: Tensor, scale: Tensor, comm: DistributedComm, chunk: int) -> Tensor:
    return ring.online_to_online(images, 0.2, comm, chunk) + 0 * (texts.sum() + scale.sum())


def nt_xent(images: Tensor, texts: Tensor, scale: Tensor, comm: DistributedComm, chunk: int) -> Tensor:
    return online_to_online(images, 0.2, comm, chunk=chunk) + 0 * (texts.sum() + scale.sum())


def differentiated(loss: Any, given: list[Tensor], comm: DistributedComm, chunk: int) -> list[Tensor]:
    """The value, the gradients of what is this rank's own, and the sums over ranks of what is shared."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    value = loss(*leaves, comm, chunk)
    images, texts, *shared = torch.autograd.grad(value, leaves)
    return [value.detach(), images, texts, *(comm.all_reduce_sum(one) for one in shared)]
