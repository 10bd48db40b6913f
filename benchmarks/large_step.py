"""Does a large model train where it would not fit whole? `amclip train` for some steps, its ranks' peak memory.

  python -m benchmarks.large_step [--recipe aclip-vitl16] [--deepspeed zero3_bf16.json] [--procs 2] [--steps 2]

Printed: the model state that the formula (docs/memory.md) expects on a rank, the peak resident memory of each rank and
of all together, and the seconds of the steps. What the machine has free is reported first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from amclip_ds import config as settings
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.jsonl import read_lines
from amclip_ds.plan.model_state import state_of
from amclip_ds.plan.work import work_of

GB = 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="aclip-vitl16")
    parser.add_argument("--deepspeed", default="zero3_bf16.json")
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="samples of all ranks together")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the recipe's keys")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-") as folder:
        scenes, run = Path(folder, "scenes"), Path(folder, "run")
        write_dataset(scenes, max(64, args.batch * args.steps), 0, 224, 0)
        words = [
            f"data.train={scenes}/train",
            f"run.out={run}",
            f"run.steps={args.steps}",
            "log.every_steps=1",
            "run.epochs=null",
            f"batch.global_size={args.batch}",
            f"engine.deepspeed={args.deepspeed}",
            "optim.warmup_steps=0",
            "data.workers=0",
            "log.tensorboard=false",
            "watchdog.step_timeout_s=null",
            *args.set,  # on a few cores a step takes minutes
        ]
        words = list({word.partition("=")[0]: word for word in words}.values())  # --set has the last word
        state = state_of(work_of(settings.load(args.recipe, words), args.procs))
        free = psutil.virtual_memory().available / GB
        print(f"{args.recipe}, {args.deepspeed}, {args.procs} processes, batch {args.batch}; {free:.1f} GB free")
        parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in state.items())
        print(f"the formula: {sum(state.values()) / GB:.2f} GB of model state a rank ({parts})", flush=True)
        command = [sys.executable, "-m", "amclip_ds", "train", args.recipe, *words, "--procs", str(args.procs)]
        began = time.monotonic()
        launcher = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peaks, together = watch(launcher)
        for rank, peak in enumerate(sorted(peaks.values(), reverse=True)[: args.procs]):
            print(f"peak resident memory of a rank: {peak / GB:.2f} GB" + (" (the largest)" if rank == 0 else ""))
        print(f"all processes together, largest at one time (shared pages counted once): {together / GB:.2f} GB")
        for row in read_lines(run / "metrics.jsonl"):
            print(f"step {row['step']}: {row['step_s']:.1f} s, loss {row['loss']:.3f}")
        print(f"exit code {launcher.returncode}, {time.monotonic() - began:.0f} s in all")
    return launcher.returncode


def watch(launcher: subprocess.Popen) -> tuple[dict[int, float], float]:
    """Until the launcher ends: each descendant's peak resident bytes, and the largest sum of proportional ones."""
    peaks: dict[int, float] = {}
    together = 0.0
    while launcher.poll() is None:
        proportional = 0.0
        for process in psutil.Process(launcher.pid).children(recursive=True):
            try:
                memory = process.memory_full_info()
                peaks[process.pid] = max(peaks.get(process.pid, 0.0), memory.rss)
                proportional += memory.pss
            except psutil.Error:
                continue
        together = max(together, proportional)
        time.sleep(0.5)
    return peaks, together


if __name__ == "__main__":
    sys.exit(main())
