"""An objective of one's own on real engines: who calls which part of it, how often, and what its state does."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from amclip_ds.model.init import constant
from amclip_ds.objectives import OBJECTIVES, Objective, Weighted
from tests.distributed.cases import running

CALLS: Counter[str] = Counter()


class Counting(Objective):
    """A head of its own parameter, a target by patch, a centre."""

    features = frozenset({"patches"})
    targets = frozenset({"patches"})
    averaged = ("head",)
    init = {"centre": constant(0.1), "gain": constant(1.0)}

    def __init__(self, options: Any, sizes: Any) -> None:
        super().__init__(options, sizes)
        self.head = nn.Linear(sizes.vision_width, 5)
        self.gain = nn.Parameter(torch.ones(5))
        self.register_buffer("centre", torch.zeros(5))
        self.factor = 1.0

    def observe(self, copies: Any, seen: Any, comm: Any) -> tuple[Tensor, ...]:
        CALLS["observe"] += 1
        return (copies["head"](seen.patches).float(),)

    def per_sample(self, features: Any, targets: Any) -> dict[str, Tensor]:
        CALLS[f"per_sample {len(targets[0])} {torch.is_grad_enabled()}"] += 1
        ours = [(self.head(view).float().mean(1) * self.gain.float()) for view in features.patches]
        wanted = targets[0].mean(1) - self.centre
        return {"counting": self.factor * torch.stack([(view - wanted).square().mean() for view in ours]).mean()}

    def forward(self, features: Any, targets: Any, comm: Any) -> dict[str, Tensor]:
        CALLS[f"forward {len(targets[0])}"] += 1
        self.seen = targets[0].mean((0, 1))
        return {}

    def commit(self, comm: Any) -> None:
        CALLS["commit"] += 1
        self.centre.lerp_(comm.all_reduce_sum(self.seen) / comm.world_size, 0.5)


def counted(ds: str, accumulation: int) -> list[dict[str, Any]]:
    """By step: the calls, whether it was applied, the centre, the loss. The third step's loss is not finite."""
    OBJECTIVES["counting"] = Counting
    found: list[dict[str, Any]] = []
    with running(ds, steps=4, accumulation=accumulation, own={"counting": Weighted(weight=0.5)}) as run:
        own: Any = run.student.module.objectives["counting"]  # type: ignore[index]
        first = own.centre.tolist()
        for step in range(4):
            CALLS.clear()
            own.factor = float("nan") if step == 2 else 1.0
            taken = run.step(step)
            row = {"applied": taken["applied"], "centre": own.centre.tolist(), "loss": taken["loss"]}
            found.append(row | {"calls": dict(CALLS)})
        found.append({"first": first, "state": sorted(run.student.full_state())})
    return found
