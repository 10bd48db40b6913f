"""The ranks that save and load together: agreements over a CPU group of their own, so that no GPU waits for a disk.

Everything but `__init__`'s fields is collective: every rank must call, in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist

from amclip_ds.ranks.collectives import cpu_group

SPARE_S = 60.0  # what a collective may wait beyond a save's own limit, so that the limit is named, not the collective


class Ranks:
    """This rank among the others; one rank without a process group is a world of one."""

    def __init__(self, timeout_s: float = 600.0) -> None:
        """timeout_s: the longest that one rank may keep the others waiting. Collective: every rank must call."""
        is_world = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if is_world else 0
        self.world_size = dist.get_world_size() if is_world else 1
        self._group: Any = None
        if is_world:
            self._group = cpu_group(timeout_s + SPARE_S)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def to_main(self, value: Any) -> list[Any]:
        """On rank 0 every rank's value, in rank order; on the others nothing. For what only rank 0 reads: at a thousand
        ranks nobody else unpacks a thousand of them."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def from_main(self, value: Any) -> Any:
        """Rank 0's value."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def all_true_each(self, *conditions: bool) -> list[bool]:
        """For each condition, whether it holds on every rank; a hundred microseconds."""
        if self._group is None:
            return list(conditions)
        reported = torch.tensor([int(condition) for condition in conditions])
        dist.all_reduce(reported, dist.ReduceOp.MIN, group=self._group)
        return [bool(value) for value in reported.tolist()]
