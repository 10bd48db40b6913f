"""Ranks as threads of one process, whose collectives stay in one autograd graph: gradients add up over the ranks.

The real collectives are tested in tests/distributed; here the mathematics of losses and batch norm is.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _World:
    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=120)
        self.slots: list[Tensor | None] = [None] * world_size


class ThreadComm:
    """loss.comm.Comm between threads."""

    def __init__(self, rank: int, world: _World) -> None:
        self.rank = rank
        self.world_size = len(world.slots)
        self._world = world

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._world.slots[self.rank] = x
        self._world.barrier.wait()
        everyone = [slot for slot in self._world.slots if slot is not None]
        self._world.barrier.wait()
        return everyone

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x))

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def ring_shift(self, x: Tensor) -> Tensor:
        return self._exchange(x)[(self.rank + 1) % self.world_size]

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        arrived = self.ring_shift(x)
        return lambda: arrived


def run_threads(world_size: int, function: Callable[[ThreadComm], Any]) -> list[Any]:
    """function(comm) on every rank; the results in rank order."""
    world = _World(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadComm(rank, world))
        except BaseException as error:
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
