"""Collectives over the ranks: with gradient for the losses and the batch norm, and agreements for the run.

Everything here is collective: every rank must call, in the same order.
"""

import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from amclip_ds.errors import AmclipError, in_one_line
from amclip_ds.ranks.communication_time import COMMUNICATION

T = TypeVar("T")


class DistributedComm:
    """`comm.Comm` over torch.distributed; on one rank every collective is the identity."""

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.on_arrival: Callable[[], None] = lambda: None
        """Called before every collective of the forward pass: up to the step's first one, time is the rank's own."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[B, ...] of every rank -> [world_size * B, ...] in rank order; backward sums over the ranks."""
        self.on_arrival()
        return x if self.world_size == 1 else _AllGather.apply(x)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks; backward sums the gradients over the ranks."""
        self.on_arrival()
        return x if self.world_size == 1 else _AllReduceSum.apply(x)

    def ring_shift(self, x: Tensor) -> Tensor:
        """What the next rank (rank + 1, cyclic) holds; backward sends the gradient back to it."""
        self.on_arrival()
        return x if self.world_size == 1 else _RingShift.apply(x)

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins ring_shift, without gradient; what is returned waits for its end. x must not change until then."""
        self.on_arrival()
        return (lambda: x) if self.world_size == 1 else _begin_exchange(x, step=1)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        with COMMUNICATION.waiting():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        reduce_scatter(own, grad.contiguous())
        return own


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def reduce_scatter(own: Tensor, everything: Tensor) -> None:
    """own [n, ...] <- this rank's part of the sum over the ranks of everything [world_size * n, ...].

    Collective: every rank must call.
    """
    with _renamed():
        dist.reduce_scatter_tensor(own, everything)


def gather_flat(everything: Tensor, own: Tensor) -> None:
    """everything [world_size * n] <- every rank's own [n], in rank order. Collective: every rank must call."""
    with _renamed():
        dist.all_gather_into_tensor(everything, own)


@contextmanager
def _renamed() -> Iterator[None]:
    """Around a collective whose new name is in no torch below 2.13, which warns of the old one."""
    with COMMUNICATION.waiting(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _summed(x: Tensor) -> Tensor:
    """The sum of x over the ranks, in memory of its own. Collective: every rank must call."""
    total = x.contiguous().clone()
    with COMMUNICATION.waiting():
        dist.all_reduce(total)
    return total


class _RingShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _exchange(x, step=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _exchange(grad, step=-1)


def _exchange(x: Tensor, step: int) -> Tensor:
    """Receives from rank + step while sending to rank - step."""
    return _begin_exchange(x, step)()


def _begin_exchange(x: Tensor, step: int) -> Callable[[], Tensor]:
    """`_exchange` begun; what is returned waits for its end."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    sent = x.contiguous()
    operations = [
        dist.P2POp(dist.isend, sent, (rank - step) % world_size),
        dist.P2POp(dist.irecv, received, (rank + step) % world_size),
    ]
    requests = dist.batch_isend_irecv(operations)

    def finish() -> Tensor:
        nonlocal sent  # kept until it has gone
        with COMMUNICATION.waiting():
            for request in requests:
                request.wait()
        del sent
        return received

    return finish


def cpu_group(timeout_s: float) -> dist.ProcessGroup:
    """A gloo group of all ranks, whose collectives wait no longer. Raises AmclipError where gloo does not connect."""
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError, ValueError) as error:  # NCCL may well have found its interface by itself
        raise AmclipError(
            f"rank {my_rank()} on {socket.gethostname()} could not meet the others through gloo (where the host's name"
            f" resolves to 127.0.1.1: GLOO_SOCKET_IFNAME=the interface): {in_one_line(error, 300)}"
        ) from error


def my_rank() -> int:
    """This rank; 0 where there are no others."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_row(row: Tensor) -> Tensor:
    """Every rank's row of numbers [n], in rank order: [world_size, n], the same bits everywhere, which a sum over ranks
    does not promise. The host does not wait for it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return row[None]
    everywhere = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    with COMMUNICATION.waiting():
        dist.all_gather(everywhere, row)
    return torch.stack(everywhere)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order; for rare and small things."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_main(work: Callable[[], T]) -> T:
    """Does `work` on rank 0 and gives every rank its result. What it raises there is raised on all ranks: an
    AmclipError as it is, anything else as an AmclipError that names it (on rank 0 as it is, with its traceback)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # whatever it is, the others wait to hear of it
            failure, outcome[1] = error, _for_others(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise failure or outcome[1]
    return outcome[0]


def on_all(work: Callable[[], T]) -> T:
    """Does `work`, which holds no collective, on every rank. Where it fails on any, all raise the AmclipError of the
    lowest rank that has one (another kind of error becomes one that names it)."""
    failure: Exception | None = None
    try:
        value = work()
    except Exception as error:
        failure = error
    reported = next((error for error in gather_objects(failure and _for_others(failure)) if error), None)
    if reported is not None:
        raise reported from failure
    return value


def _for_others(error: Exception) -> AmclipError:
    """What the other ranks learn of an error: something that surely travels."""
    if isinstance(error, AmclipError):
        error.is_shared = True  # rank 0 reports it for all
        return error
    return AmclipError(f"rank {my_rank()}: {type(error).__name__}: {error}")


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' numbers. Collective: every rank must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    packed = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(packed, dist.ReduceOp.MAX)
    return float(packed)


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each number over the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / dist.get_world_size()).tolist()))
