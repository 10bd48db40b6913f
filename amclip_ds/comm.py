"""What the losses and the batch norm ask of the other ranks, as an interface; and its one-process form."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """Collectives with gradient, handed in by whoever knows the ranks. Every rank must call each in the same order."""

    rank: int
    world_size: int

    def all_gather(self, x: Tensor) -> Tensor:
        """[B, ...] of every rank -> [world_size * B, ...] in rank order; backward sums over the ranks."""
        ...

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks; backward sums the gradients over the ranks."""
        ...

    def ring_shift(self, x: Tensor) -> Tensor:
        """What the next rank (rank + 1, cyclic) holds; backward sends the gradient back to it."""
        ...

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        """Begins ring_shift, without gradient; what is returned waits for its end. x must not change until then."""
        ...


class SingleProcess:
    """One rank: every collective is the identity."""

    rank = 0
    world_size = 1

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x

    def ring_shift(self, x: Tensor) -> Tensor:
        return x

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x
