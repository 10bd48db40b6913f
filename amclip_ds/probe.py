"""`amclip plan --probe`: whole training steps of a configuration here, on made samples, beside what was planned."""

import dataclasses
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from amclip_ds import run as runs
from amclip_ds.config import TrainConfig, check_buildable, plan_batch
from amclip_ds.data.synthetic import SceneConfig, write_shard
from amclip_ds.engine.memory import measured_model_state, relative_difference
from amclip_ds.forecast import device_of
from amclip_ds.method import method_of
from amclip_ds.optim import Schedules
from amclip_ds.plan import work
from amclip_ds.plan.gpus import PROBED, Gpu, Rate
from amclip_ds.plan.model_state import state_of
from amclip_ds.plan.planner import GIB, memory_of
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.resilience.guards import Guards
from amclip_ds.step import train_step

WARM_STEPS = 2
STEPS = 3
ON_CPU = 64  # samples of a step: a probe is to end


@dataclass(frozen=True)
class Probe:
    """What was measured, and what had been planned for the same steps."""

    gpu: Gpu
    rate: Rate
    batch: int
    step_s: float
    planned_state: float
    """bytes, without gradients, which are gone between two steps"""
    measured_state: float
    planned_peak: float
    measured_peak: float | None
    """None on a CPU, where nothing counts it"""

    def lines(self) -> Iterator[str]:
        """For people."""
        off = relative_difference(self.measured_state, self.planned_state)
        of_steps = f"median of {STEPS} after {WARM_STEPS}"
        yield f"probe on {self.gpu.name}: {self.batch} samples, {self.step_s:.3f} s a step ({of_steps})"
        yield (
            f"  model state without gradients: planned {self.planned_state / GIB:.4f} GiB, measured"
            f" {self.measured_state / GIB:.4f} ({off:.1%} apart)"
        )
        if self.measured_peak is not None:
            apart = relative_difference(self.measured_peak, self.planned_peak)
            peaks = f"planned {self.planned_peak / GIB:.2f} GiB, measured {self.measured_peak / GIB:.2f}"
            yield f"  peak: {peaks} ({apart:.1%} apart)"

    def json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "device": self.gpu.name,
            "batch": self.batch,
            "step_s": self.step_s,
            "samples_per_s": self.batch / self.step_s,
            "tflops": self.rate.flops_per_s / work.TERA,
            "planned_state_gib": self.planned_state / GIB,
            "measured_state_gib": self.measured_state / GIB,
            "planned_peak_gib": self.planned_peak / GIB,
            "measured_peak_gib": None if self.measured_peak is None else self.measured_peak / GIB,
        }


def probe(config: TrainConfig) -> Probe:
    """Measures steps of one rank's micro-batch on this machine. Raises UserError for what cannot be built."""
    check_buildable(config)
    folder = Path(tempfile.mkdtemp(prefix="amclip-probe-"))
    try:
        with _alone(config.run.deterministic) as runtime:
            return _measure(_small(config, folder, runtime), runtime)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(deterministic: bool) -> Iterator[Runtime]:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    runtime = engine_runtime.start(deterministic=deterministic)
    try:
        yield runtime
    finally:
        engine_runtime.stop(runtime)


def _small(config: TrainConfig, folder: Path, runtime: Runtime) -> TrainConfig:
    """The configuration with one micro-batch a step, of samples that are made for it."""
    micro = plan_batch(config.batch, 1).micro
    if runtime.device.type == "cpu":
        micro = min(micro, ON_CPU)
    scenes = SceneConfig(image_size=64)
    write_shard(scenes, (folder / "00000.tar", "train", range(max(micro, 64))))
    return dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, global_size=micro, per_gpu=micro),
        run=dataclasses.replace(config.run, out=str(folder / "run"), steps=1000, epochs=None),
        data=dataclasses.replace(
            config.data,
            train=str(folder / "00000.tar"),
            index=None,
            weights=None,
            workers=0,
            stage_dir="",
            captions=["txt|json:captions"],
        ),
        model=dataclasses.replace(config.model, init_from=None),
    )


def _measure(config: TrainConfig, runtime: Runtime) -> Probe:
    method, comm = method_of(config), DistributedComm()
    micro = config.batch.global_size
    with closing(runs.open_data(config, method, runtime)) as data:
        batch = next(iter(data.batches(None))).to(runtime.device)
    student, teacher = runs.build_engines(config, method, runtime)
    schedules, guards = Schedules(config.optim, config.teacher, 1000), Guards(config.guards, lambda *row: None)
    is_cuda = runtime.device.type == "cuda"
    times = []
    for index in range(WARM_STEPS + STEPS):
        if is_cuda:
            torch.cuda.synchronize()
            if index == WARM_STEPS:
                torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        train_step(batch, student, teacher, schedules, 1, method, comm, micro, guards)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step_s = statistics.median(times[WARM_STEPS:])
    step = work.work_of(config, runtime.world_size, batch.token_ids.shape[1])
    measured = measured_model_state(student, teacher)
    return Probe(
        gpu=_device(runtime),
        batch=micro,
        rate=Rate(work.flops_of(step).executed / step_s, f"{STEPS} steps here (--probe)", stage=student.stage),
        step_s=step_s,
        planned_state=sum(size for part, size in state_of(step, 0).items() if part != "gradients"),
        measured_state=sum(size for part, size in measured.items() if part != "gradients"),
        planned_peak=memory_of(step).peak,
        measured_peak=float(torch.cuda.max_memory_allocated()) if is_cuda else None,
    )


def _device(runtime: Runtime) -> Gpu:
    found = device_of(runtime)
    if found is not None:
        return dataclasses.replace(found, name=f"{PROBED} ({found.name})")
    return Gpu(f"{PROBED} (CPU)", psutil.virtual_memory().total / GIB, None, None)
