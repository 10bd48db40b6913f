"""What a logged step cost and brought: interval means of time, and the numbers of the step, the same on every rank."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from amclip_ds import bottleneck
from amclip_ds.data.batch import Batch
from amclip_ds.engine.memory import peak_bytes
from amclip_ds.engine.student import StudentEngine
from amclip_ds.processes import num_cores
from amclip_ds.ranks.collectives import max_over_ranks, mean_over_ranks
from amclip_ds.ranks.communication_time import COMMUNICATION
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.sizes import GIB
from amclip_ds.step import StepResult

SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices whose product gives a device's rate
MEASURED_S = 0.1
Operations = Callable[[int | list[int], float, float], float]
"""(kept tokens of the views, tokens of a text, how much of the run is done) -> floating point operations of a rank's
batch, recomputation apart."""


class Meter:
    """Times the loop between two logged steps, and says what it waited for."""

    def __init__(
        self, global_batch: int, runtime: Runtime, workers: int, operations: Operations | None, student: StudentEngine
    ) -> None:
        """operations: None where they cannot be counted; then rows have no tflops and mfu.

        The arithmetic is held against a matrix product in the dtype of the student's forward.
        """
        self._global_batch, self._device, self._workers = global_batch, runtime.device, workers
        self._cores = cores_of_a_rank(runtime.local_world_size)
        self._operations, self._text = operations, student.module.text
        self._dtype, self._rate = student.dtype, matrix_rate(runtime.device, student.dtype)
        self._restart()

    def _restart(self) -> None:
        COMMUNICATION.take()
        self._wait_s, self._steps, self._tokens, self._began = 0.0, 0, 0.0, time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time spent waiting for each is noted. The clock begins with the first: what is between
        the engines and it (a checkpoint to resume, an evaluation to make up) is no step's."""
        self._restart()
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_s += time.perf_counter() - began
            self._steps += 1
            self._tokens += self._padded_tokens(batch)
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out time that belongs to no step (an evaluation, a save)."""
        began = time.perf_counter()
        with COMMUNICATION.paused():
            yield
        self._began += time.perf_counter() - began

    def row(self, result: StepResult, more: dict[str, float] | None = None) -> dict[str, Any]:
        """The step's losses, and `more` of it, as means over the ranks; the interval's times. Collective: every rank
        must call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        steps, elapsed = max(1, self._steps), time.perf_counter() - self._began
        local = {"loss": float(result.loss)} | {name: float(part) for name, part in result.parts.items()}
        local |= more or {}
        local |= {"data_wait_s": self._wait_s / steps, "step_s": elapsed / steps}
        local["communication_s"] = COMMUNICATION.take() / steps
        if self._operations is not None:
            flops = self._operations(result.kept_tokens, self._tokens / steps, result.progress)
            local |= {"flops": flops, "rate": self._fastest(flops / local["step_s"])}
        row: dict[str, Any] = dict(mean_over_ranks(local, self._device))
        row["samples_per_s"] = self._global_batch / row["step_s"]
        if self._operations is not None:
            flops_per_s = row.pop("flops") / row["step_s"]
            row |= {"tflops": flops_per_s / 1e12, "mfu": flops_per_s / row.pop("rate")}
        row["peak_memory_gib"] = max_over_ranks(peak_bytes(self._device) / GIB, self._device)
        row |= {
            "lr": result.lr,
            "momentum": result.momentum,
            "logit_scale": float(result.logit_scale),
            "grad_norm": float(result.grad_norm),
            "step_applied": result.applied,
            "kept_tokens": result.kept_tokens,
        }
        self._restart()
        return row

    def _fastest(self, flops_per_s: float) -> float:
        """The rate that MFU is a share of; measured again where a step was faster, since others had the cores then."""
        if flops_per_s > self._rate:
            self._rate = max(flops_per_s, matrix_rate(self._device, self._dtype))
        return self._rate

    def _padded_tokens(self, batch: Batch) -> float:
        """Places of a text that are worked through, the mean over the batch."""
        count, longest = batch.token_ids.shape
        groups = self._text.groups(batch.text_lengths.get("plain"), longest)  # type: ignore[operator,union-attr]
        return sum(len(group.rows) * group.length for group in groups) / count if groups else float(longest)

    def verdict(self, row: dict[str, Any]) -> bottleneck.Bottleneck:
        """What the steps of a row waited for, and what would change it."""
        return bottleneck.judge(row["step_s"], row["data_wait_s"], row["communication_s"], self._workers, self._cores)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product on this device: the fastest of those in MEASURED_S,
    longer than others keep a busy core, since what else runs on the machine only ever takes away."""
    side = SIDE.get(device.type, SIDE["cpu"])
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 6 or sum(times[1:]) < MEASURED_S:
        began = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2.0 * side**3 / min(times[1:])


def cores_of_a_rank(local_world_size: int) -> int:
    """Cores this rank may use: those it is bound to, or its share of the machine where it is bound to none."""
    mine, whole = num_cores(), os.cpu_count() or 1
    return mine if mine < whole else max(1, mine // local_world_size)
