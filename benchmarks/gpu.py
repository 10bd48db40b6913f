"""Steps of A-CLIP on one GPU: samples/s, peak memory and MFU, by size, ZeRO stage and activation checkpointing.

    python -m benchmarks.gpu --data SHARDS --out gpu.jsonl [--cells vitb16:2 vitl16:3 ...] [--batch vitb16=256]

Each cell (size:stage, or size:stage:compile, or size:stage:fed) has a process of its own, since a ZeRO-3 engine
patches torch; one at a time is measured, while the next ones build. A step is the run's own `train_step`, with teacher,
augmentation and optimizer, on one real batch that stays on the device. MFU is the model's floating point operations
(counted by torch, without recomputation) over the time, against a bf16 matrix product of the same GPU and process.
`fed`: the same step fed by the loader and its workers against the batch that stays.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

CELLS = [f"{size}:{stage}" for size in ("vitb16", "vitl16") for stage in (1, 2, 3)]
CELLS += ["vitb16:2:fed", "vitb16:2:compile"]
FED_STEPS = 40  # more than the workers have made ahead
GIB = 1024.0**3
SIDE = 8192  # of the matrices that show the machine's rate


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def seconds_of(work: Callable[[], Any], repeats: int, warm: int) -> list[float]:
    """The device's seconds of each call, after `warm` calls that do not count."""
    for _ in range(warm):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in zip(events, events[1:])]


def matrix_rate() -> float:
    """bf16 FLOP/s of a large matrix product on random data."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / statistics.median(seconds_of(lambda: a @ b, 10, 3))


class Cell:
    """The engines of one size and stage, and a batch that stays on the device."""

    def __init__(self, size: str, stage: int, extra: str, args: argparse.Namespace) -> None:
        from amclip_ds import config as settings
        from amclip_ds import run
        from amclip_ds.engine import runtime as engine_runtime
        from amclip_ds.engine.collectives import DistributedComm
        from amclip_ds.method import method_of
        from amclip_ds.optim import Schedules
        from amclip_ds.resilience.guards import Guards

        self.batch_size = args.batch[size]
        workers = args.workers if extra == "fed" else 0
        self.config = settings.load(
            f"aclip-{size}",
            [
                f"data.train={args.data}",
                f"run.out={args.out.parent}/{size}{stage}{extra}",
                "run.steps=1000",
                "run.epochs=null",
                f"batch.global_size={self.batch_size}",
                f"batch.per_gpu={self.batch_size}",
                f"engine.deepspeed=zero{stage}_bf16.json",
                f"data.workers={workers}",
                "optim.warmup_steps=10",
                f"engine.compile={'tower' if extra == 'compile' else 'none'}",
            ],
        )
        Path(self.config.run.out).mkdir(parents=True, exist_ok=True)
        self.runtime = engine_runtime.start()
        self.method = method_of(self.config)
        self.data = run.open_data(self.config, self.method, self.runtime)
        self.student, self.teacher = run.build_engines(self.config, self.method, self.runtime)
        self.comm, self.guards = DistributedComm(), Guards(self.config.guards, lambda *row: None)
        self.schedules = Schedules(self.config.optim, self.config.teacher, 1000)
        self.batches = self.data.batches(None)
        self.batch = next(self.batches).to(self.runtime.device)

    def step(self, batch: Any = None) -> Any:
        from amclip_ds.step import train_step

        return train_step(
            batch or self.batch,
            self.student,
            self.teacher,
            self.schedules,
            5,
            self.method,
            self.comm,
            self.batch_size,
            self.guards,
        )

    def recompute(self, every: int) -> None:
        """Activation checkpointing of both towers."""
        self.student.module.vision.checkpoint_every = self.student.module.text.checkpoint_every = every

    def flops(self) -> int | None:
        """Floating point operations of a step without recomputation."""
        counter = FlopCounterMode(display=False)
        with counter:
            self.step()
        return counter.get_total_flops()


def measure(cell: Cell, rate: float, recompute: int, repeats: int) -> dict[str, Any]:
    cell.recompute(recompute)
    torch.cuda.reset_peak_memory_stats()
    times = seconds_of(cell.step, repeats, 4)
    step_s, flops = statistics.median(times), None
    peak = torch.cuda.max_memory_allocated()
    if not recompute:
        flops = cell.flops()
    return {
        "batch": cell.batch_size,
        "checkpoint_every": recompute,
        "step_s": step_s,
        "fastest_s": min(times),
        "slowest_s": max(times),
        "samples_per_s": cell.batch_size / step_s,
        "peak_gib": peak / GIB,
        "flops": flops,
        "matrix_tflops": rate / 1e12,
        "mfu": flops / step_s / rate if flops else None,
    }


def measure_fed(cell: Cell) -> dict[str, Any]:
    """Wall seconds of a step: the resident batch, the loader's, the resident batch again."""
    cell.recompute(0)

    def wall(fetch: Callable[[], Any]) -> tuple[float, float]:
        torch.cuda.synchronize()
        waited, began = 0.0, time.perf_counter()
        for _ in range(FED_STEPS):
            asked = time.perf_counter()
            batch = fetch()
            waited += time.perf_counter() - asked
            cell.step(batch)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / FED_STEPS, waited / FED_STEPS

    for _ in range(4):
        cell.step()
    before, _ = wall(lambda: None)
    fed, waited = wall(lambda: next(cell.batches).to(cell.runtime.device))
    after, _ = wall(lambda: None)
    resident = (before + after) / 2
    return {
        "batch": cell.batch_size,
        "workers": cell.config.data.workers,
        "resident_step_s": [before, after],
        "fed_step_s": fed,
        "waited_s": waited,
        "fed_over_resident": fed / resident,
    }


def run_cell(args: argparse.Namespace) -> None:
    size, stage, *rest = args.cell.split(":")
    extra = rest[0] if rest else ""
    began = time.perf_counter()
    cell = Cell(size, int(stage), extra, args)
    facts = {"cell": args.cell, "built_s": time.perf_counter() - began}
    with alone(args.out.with_suffix(".lock")):
        rate = matrix_rate()
        if extra == "fed":
            rows = [measure_fed(cell)]
        else:
            rows = [measure(cell, rate, recompute, args.repeats) for recompute in ((0,) if extra else (0, 1))]
            for row in rows:  # the operations of a step do not depend on what is recomputed
                row["flops"] = rows[0]["flops"]
                row["mfu"] = rows[0]["flops"] / row["step_s"] / rate
        with args.out.open("a") as file:
            for row in rows:
                text = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in (facts | row).items()})
                print(text, file=file)
                print(text, flush=True)
    os._exit(0)  # the loader's workers and NCCL need no farewell


def read_batches(words: list[str]) -> dict[str, int]:
    return {name: int(number) for name, number in (word.split("=") for word in words)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="training shards with real photographs")
    parser.add_argument("--out", type=Path, required=True, help="where the rows go (JSON lines)")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--batch", nargs="*", default=[], metavar="SIZE=N")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--workers", type=int, default=14, help="of the fed cell")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        args.batch = {"tiny": 64, "vitb16": 256, "vitl16": 128} | read_batches(args.batch)
        run_cell(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    waiting, running, failed = list(args.cells), [], 0
    while waiting or running:
        while waiting and len(running) < 3:
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--cell", waiting[0]]
            running.append((waiting.pop(0), subprocess.Popen(command)))
        for name, process in list(running):
            if process.poll() is not None:
                running.remove((name, process))
                failed += process.returncode != 0
                if process.returncode:
                    print(f"{name}: failed ({process.returncode})", flush=True)
        time.sleep(0.1)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
