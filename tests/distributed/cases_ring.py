"""The ring's losses over real ranks (gloo), against the gathered ones."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.engine import runtime as engine_runtime
from amclip_ds.engine.collectives import DistributedComm
from amclip_ds.objectives import ring
from amclip_ds.objectives.contrastive import info_nce
from amclip_ds.objectives.sigmoid import sigmoid

LOCAL, VIEWS, WIDTH = 5, 2, 6


def against_gather(chunk: int) -> dict[str, float]:
    """The largest difference of values and of gradients (of the sum over ranks), by kind of loss, in fp64."""
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
    ):
        ours, theirs = (differentiated(loss, given, comm, chunk) for loss in losses)
        found[kind] = max(float((one - other).abs().max()) for one, other in zip(ours, theirs))
    engine_runtime.stop(runtime)
    return found


def differentiated(loss: Any, given: list[Tensor], comm: DistributedComm, chunk: int) -> list[Tensor]:
    """The value, the gradients of what is this rank's own, and the sums over ranks of what is shared."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    value = loss(*leaves, comm, chunk)
    images, texts, *shared = torch.autograd.grad(value, leaves)
    return [value.detach(), images, texts, *(comm.all_reduce_sum(one) for one in shared)]
