"""What a run is planned to take, checked before its engines are built, and what it took: RUN/plan.json, two lines."""

import json
from typing import Any

import torch

from amclip_ds import run_files
from amclip_ds.config import TrainConfig
from amclip_ds.engine.memory import measured_model_state, relative_difference
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.errors import UserError
from amclip_ds.plan import work
from amclip_ds.plan.gpus import Gpu, kind_of, rate_of
from amclip_ds.plan.model_state import state_of
from amclip_ds.plan.planner import GIB, memory_of
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.record import Record

AFTER_STEPS = 2  # the optimizer's moments are made in the first


def device_of(runtime: Runtime) -> Gpu | None:
    """The GPU that a rank computes on, with what is known of its kind; None on a CPU."""
    if runtime.device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(runtime.device)
    memory = found.total_memory / GIB
    known = kind_of(found.name, memory)
    return Gpu(
        known.name if known else found.name, memory, *((known.peak_tflops, known.watts) if known else (None, None))
    )


class Forecast:
    """Made and asked on rank 0; nothing in it is collective. One of its numbers ends a run: a state that cannot fit."""

    def __init__(self, config: TrainConfig, world_size: int, gpu: Gpu | None) -> None:
        """gpu: this rank's; None on a CPU. Raises UserError where the model state alone is larger than the GPU."""
        self._steps = 0
        self._problem: str | None = None
        self._predicted: dict[str, Any] = {}
        try:
            step = work.work_of(config, world_size)
            memory, flops = memory_of(step), work.flops_of(step)
            state, of_rank_0 = state_of(step), state_of(step, rank=0)
        except UserError as error:  # of a part that cannot be counted: the run may be sound all the same
            self._problem = str(error)
            return
        rate = None if gpu is None else rate_of(gpu, step)
        self._predicted = {
            "world_size": world_size,
            "stage": step.stage,
            "model_state_gib": sum(state.values()) / GIB,
            "between_steps_gib": sum(size for part, size in of_rank_0.items() if part != "gradients") / GIB,
            "activations_gib": memory.activations / GIB,
            "peak_gib": memory.peak / GIB,
            "by_part": {part: size / GIB for part, size in memory.by_part.items()},
            "tflop_per_step": flops.model * world_size / work.TERA,
            "samples_per_s": None if rate is None else config.batch.global_size / rate.step_s(step),
            "device": None if gpu is None else gpu.name,
            "device_gib": None if gpu is None else gpu.memory_gib,
            "device_watts": None if gpu is None else gpu.watts,
        }
        if gpu is not None and self._predicted["model_state_gib"] > gpu.memory_gib:
            raise UserError(
                f"engine.deepspeed: the model state alone is {self._predicted['model_state_gib']:.1f} GiB on each of"
                f" {world_size} ranks, and the GPU has {gpu.memory_gib:.1f}; take a higher ZeRO stage, an"
                " _offload file or more GPUs (amclip plan shows which fit)"
            )

    def line(self) -> str:
        """What was planned, before the first step."""
        if self._problem is not None:
            return f"plan: none: {self._problem}"
        planned = self._predicted
        speed = "" if planned["samples_per_s"] is None else f", {planned['samples_per_s']:,.0f} samples/s at most"
        said = (
            f"plan: {planned['model_state_gib']:.2f} GiB of model state and {planned['peak_gib']:.2f} GiB at the peak"
            f" on a rank, {planned['tflop_per_step']:.3g} TFLOP a step{speed}"
        )
        if planned["device_gib"] is not None and planned["peak_gib"] > planned["device_gib"]:
            said += (
                f"; the GPU has {planned['device_gib']:.1f} GiB: it may run out; a smaller batch.per_gpu takes less, at"
                " the price of a second forward (amclip plan)"
            )
        return said

    def after_step(self, student: StudentEngine, teacher: Teacher | None, step: int, record: Record) -> None:
        """Measures once, after the second step of an attempt, and writes RUN/plan.json."""
        self._steps += 1
        if self._steps != AFTER_STEPS or not self._predicted:
            return
        found = measured_model_state(student, teacher)
        state = sum(size for part, size in found.items() if part != "gradients") / GIB
        peak = torch.cuda.max_memory_allocated() / GIB if self._predicted["device"] else None
        measured = {
            "step": step,
            "between_steps_gib": state,
            "by_part": {part: size / GIB for part, size in found.items()},
            "peak_gib": peak,
        }
        record.replace(
            record.folder / run_files.PLAN,
            json.dumps({"predicted": self._predicted, "measured": measured}, indent=1) + "\n",
        )
        planned = self._predicted["between_steps_gib"]
        at_peak = "" if peak is None else f"; peak {self._predicted['peak_gib']:.2f} planned, {peak:.2f} measured"
        record.say(
            f"memory: {planned:.3f} GiB of model state between two steps planned, {state:.3f} measured"
            f" ({relative_difference(state, planned):.1%} apart){at_peak}"
        )
