"""What a logged step cost and brought: interval means of time, and the numbers of the step, the same on every rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from amclip_ds.data.batch import Batch
from amclip_ds.engine.collectives import mean_over_ranks
from amclip_ds.step import StepResult


class Meter:
    """Times the loop between two logged steps."""

    def __init__(self, global_batch: int, device: torch.device) -> None:
        self._global_batch, self._device = global_batch, device
        self._restart()

    def _restart(self) -> None:
        self._wait_s, self._steps, self._began = 0.0, 0, time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, on the device; the time spent waiting for each is noted."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_s += time.perf_counter() - began
            self._steps += 1
            yield batch.to(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out time that belongs to no step (an evaluation, a save)."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def row(self, result: StepResult) -> dict[str, Any]:
        """The step's losses as means over the ranks, and the interval's times. Collective: every rank must call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps, elapsed = max(1, self._steps), time.perf_counter() - self._began
        local = {"loss": float(result.loss)} | {name: float(part) for name, part in result.parts.items()}
        local |= {"data_wait_s": self._wait_s / steps, "step_s": elapsed / steps}
        row = mean_over_ranks(local, self._device)
        row["samples_per_s"] = self._global_batch / row["step_s"]
        row |= {
            "lr": result.lr, "momentum": result.momentum, "logit_scale": float(result.logit_scale),
            "grad_norm": result.grad_norm, "step_applied": result.applied, "kept_tokens": result.kept_tokens,
        }  # fmt: skip
        self._restart()
        return row
