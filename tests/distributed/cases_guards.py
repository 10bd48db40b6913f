"""What becomes of a step whose finite loss the guards refuse, on real ranks."""

import math
from typing import Any

import torch
from torch import Tensor

from amclip_ds.model.features import Losses
from amclip_ds.ranks import runtime as engine_runtime
from tests.distributed.cases import Run
from tests.distributed.cases_engine import same


def spike_refused(ds: str, accumulation: int = 1, is_obeyed: bool = True, optim: str = "adamw") -> dict[str, Any]:
    """Steps 0 1 X 2 beside 0 1 2, where the loss of X is a spike and its gradient sound.

    is_obeyed False: the gradient is taken all the same, as if nobody multiplied the loss by the verdict.
    """
    runtime = engine_runtime.start()
    settings: dict[str, Any] = {
        "runtime": runtime,
        "accumulation": accumulation,
        "guards": {"spike": "skip", "spike_window": 3},
        "optim": {"name": optim, "lr": 0.001},
    }
    control = Run(ds, **settings)
    for step in (0, 1, 2):
        control.step(step)
    run = Run(ds, **settings)
    ids = torch.arange(4) + 100 * runtime.rank
    for step in (0, 1):
        run.guards.account(step, run.step(step)["applied"], ids)
    before, window = run.state(), list(run.guards.window)
    committed: list[int] = []
    run.student.commit = lambda *_: committed.append(1)  # type: ignore[method-assign]

    admit = run.guards.admit

    def leave(losses: Losses) -> Tensor:
        admit(losses)
        return torch.ones(())

    if not is_obeyed:
        run.guards.admit = leave  # type: ignore[method-assign]
    run.guards.window = [0.1, 0.1, 0.1]
    refused = run.step(1)
    reason = run.guards.reason
    run.guards.account(2, refused["applied"], ids)
    run.guards.window = window
    del run.student.commit
    after = run.state()
    run.guards.admit = admit  # type: ignore[method-assign]
    run.step(2)
    result = {
        "applied": refused["applied"],
        "norm_is_known": not math.isnan(refused["norm"]),
        "reason": reason,
        "counted": (run.guards.skipped, run.updates),
        "committed": len(committed),
        "nothing_moved": same(before, after, weights_only=True),
        "next_is_control": same(control.state(), run.state(), weights_only=True),
    }
    engine_runtime.stop(runtime)
    return result
