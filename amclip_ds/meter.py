"""What a logged step cost and brought: interval means of time, and the numbers of the step, the same on every rank."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from amclip_ds.data import verdict
from amclip_ds.data.batch import Batch
from amclip_ds.data.parallel import num_cores
from amclip_ds.engine.collectives import mean_over_ranks
from amclip_ds.engine.communication_time import COMMUNICATION
from amclip_ds.engine.runtime import Runtime
from amclip_ds.step import StepResult


class Meter:
    """Times the loop between two logged steps, and says what it waited for."""

    def __init__(self, global_batch: int, runtime: Runtime, workers: int) -> None:
        self._global_batch, self._device, self._workers = global_batch, runtime.device, workers
        self._cores = cores_of_a_rank(runtime.local_world_size)
        self._restart()

    def _restart(self) -> None:
        COMMUNICATION.take()
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
        with COMMUNICATION.paused():
            yield
        self._began += time.perf_counter() - began

    def row(self, result: StepResult) -> dict[str, Any]:
        """The step's losses as means over the ranks, and the interval's times. Collective: every rank must call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps, elapsed = max(1, self._steps), time.perf_counter() - self._began
        local = {"loss": float(result.loss)} | {name: float(part) for name, part in result.parts.items()}
        local |= {"data_wait_s": self._wait_s / steps, "step_s": elapsed / steps}
        local["communication_s"] = COMMUNICATION.take() / steps
        row: dict[str, Any] = dict(mean_over_ranks(local, self._device))
        row["samples_per_s"] = self._global_batch / row["step_s"]
        row |= {
            "lr": result.lr, "momentum": result.momentum, "logit_scale": float(result.logit_scale),
            "grad_norm": result.grad_norm, "step_applied": result.applied, "kept_tokens": result.kept_tokens,
        }  # fmt: skip
        self._restart()
        return row

    def verdict(self, row: dict[str, Any]) -> verdict.Verdict:
        """What the steps of a row waited for, and what would change it."""
        return verdict.judge(row["step_s"], row["data_wait_s"], row["communication_s"], self._workers, self._cores)


def cores_of_a_rank(local_world_size: int) -> int:
    """Cores this rank may use: those it is bound to, or its share of the machine where it is bound to none."""
    mine, whole = num_cores(), os.cpu_count() or 1
    return mine if mine < whole else max(1, mine // local_world_size)
