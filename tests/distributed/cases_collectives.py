"""What a gather with gradient gives and moves, over real ranks (gloo)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm

ROWS = 3


def gathered(dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Gathers [ROWS, *shape] of each rank and differentiates a sum in which each rank weighs all rows otherwise.

    Returns the largest differences of values and gradient from what the ranks' numbers, drawn by their keys, give in
    fp64; whether the incoming gradient is as it was; and the elements that collectives took in the backward pass.
    """
    runtime = engine_runtime.start()
    comm = DistributedComm()
    world, kind = comm.world_size, getattr(torch, dtype)
    own = [torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(rank)).to(kind) for rank in range(world)]
    weights = [
        torch.randn(*shape, world * ROWS, generator=torch.Generator().manual_seed(100 + rank)).to(kind).movedim(-1, 0)
        for rank in range(world)
    ]  # not contiguous, as a loss may give them
    x = own[comm.rank].clone().requires_grad_()
    everything = comm.all_gather(x)
    incoming = weights[comm.rank].clone()
    moved: dict[str, int] = {}
    plain = {name: getattr(dist, name) for name in ("all_reduce", "reduce_scatter_tensor")}

    def counted(name: str) -> Any:
        def call(tensor: Tensor, *given: Any) -> Any:
            moved[name] = moved.get(name, 0) + tensor.numel()
            return plain[name](tensor, *given)

        return call

    for name in plain:
        setattr(dist, name, counted(name))
    everything.backward(incoming)
    for name, function in plain.items():
        setattr(dist, name, function)
    assert x.grad is not None
    expected = torch.stack(weights).double().sum(0)[comm.rank * ROWS : (comm.rank + 1) * ROWS]
    found = {
        "values": float((everything.detach() - torch.cat(own)).abs().max()),
        "gradient": float((x.grad.double() - expected).abs().max()),
        "untouched": torch.equal(incoming, weights[comm.rank]),
        "moved": moved,
        "own": x.numel(),
    }
    engine_runtime.stop(runtime)
    return found
