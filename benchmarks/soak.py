"""A run under fire: `python -m benchmarks.soak --out DIR [--minutes 30] [--seed 0]`.

First the run with faults, for so many minutes: 5 to 45 s after an attempt's first step or, one in four, while it
starts; each time started again at a random world size (1 to 3) and ZeRO stage (1 to 3). Faults: SIGKILL of one rank or
of all, of the launcher, SIGTERM to it, SIGUSR1 to one rank, a STOP file. Then the same run without, on 2 ranks at stage
2, as far as the first one came. Printed at the end: the loss curve against the fault-free one, steps that were lost and
done again, time to recover (from a fault to the next new step), goodput (the time that the steps kept take without
faults, over the time it took).
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from amclip_ds.data.synthetic import write_dataset
from amclip_ds.jsonl import read_lines

FAULTS = ("kill one rank", "kill all ranks", "kill the launcher", "SIGTERM", "SIGUSR1 to one rank", "STOP file")
SETTINGS = (
    "batch.global_size=24",
    "data.workers=1",
    "log.every_steps=1",
    "log.tensorboard=false",
    "checkpoint.every_steps=10",
    "optim.warmup_steps=20",
    "model.vision.depth=1",
    "model.text.depth=1",
)
WINDOW = 20


def start(out: Path, data: Path, steps: int, world: int, stage: int) -> subprocess.Popen:
    """`amclip train` on `world` ranks of this machine."""
    argv = [
        sys.executable,
        "-m",
        "amclip_ds",
        "train",
        "aclip-tiny",
        f"data.train={data}",
        f"run.out={out}",
        f"run.steps={steps}",
        f"engine.deepspeed=zero{stage}_fp32.json",
        *SETTINGS,
        "--procs",
        str(world),
    ]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def last_step(out: Path) -> int:
    rows = read_lines(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def last_attempt(out: Path) -> int:
    """Which start of the run wrote the last row; -1 before any."""
    rows = read_lines(out / "metrics.jsonl")
    return rows[-1]["attempt"] if rows else -1


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The trainers under a launcher, without their loaders and writers."""
    try:
        return [child for child in psutil.Process(launcher.pid).children() if "amclip_ds" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def strike(fault: str, launcher: subprocess.Popen, out: Path, dice: random.Random) -> None:
    """Does it, and waits for the launcher to end."""
    ranks = ranks_of(launcher)
    try:
        if fault == "kill one rank" and ranks:
            dice.choice(ranks).kill()
        elif fault == "kill all ranks":
            for rank in ranks:
                rank.kill()
        elif fault == "kill the launcher":
            launcher.kill()
        elif fault == "SIGTERM":
            launcher.terminate()
        elif fault == "SIGUSR1 to one rank" and ranks:
            dice.choice(ranks).send_signal(signal.SIGUSR1)
        else:
            (out / "STOP").touch()
    except psutil.NoSuchProcess:
        pass  # it ended by itself a moment ago
    launcher.wait(timeout=300)


def under_fire(out: Path, data: Path, steps: int, minutes: float, dice: random.Random) -> dict[str, Any]:
    """Runs until `steps` are done or the time is over. Returns what happened."""
    began = time.monotonic()
    deadline = began + 60 * minutes
    faults: dict[str, int] = {}
    recoveries: list[float] = []
    codes: list[int] = []
    struck_at: float | None = None
    while time.monotonic() < deadline:
        launcher = start(out, data, steps, dice.randint(1, 3), dice.randint(1, 3))
        while_starting = dice.random() < 0.25
        strike_at = time.monotonic() + (dice.uniform(5, 60) if while_starting else 600)
        seen, is_moving = last_attempt(out), False
        while launcher.poll() is None and time.monotonic() < min(strike_at, deadline):
            time.sleep(0.2)
            if is_moving or last_attempt(out) == seen:
                continue
            is_moving = True
            if not while_starting:
                strike_at = time.monotonic() + dice.uniform(5, 45)
            if struck_at is not None:
                recoveries.append(time.monotonic() - struck_at)
                struck_at = None
        if launcher.poll() is not None:
            codes.append(launcher.returncode)
            if launcher.returncode not in (0, 75):
                raise SystemExit(f"the run ended with code {launcher.returncode}; see {out.parent / out.name}.log")
            break
        fault = dice.choice(FAULTS)
        faults[fault] = faults.get(fault, 0) + 1
        struck_at = time.monotonic()
        strike(fault, launcher, out, dice)
        codes.append(launcher.returncode)
    return {"seconds": time.monotonic() - began, "faults": faults, "recoveries": recoveries, "codes": codes}


def undisturbed(out: Path, data: Path, steps: int, until: int) -> None:
    """The run without faults, stopped by a STOP file once it is as far."""
    launcher = start(out, data, steps, 2, 2)
    while launcher.poll() is None and last_step(out) < until:
        time.sleep(0.5)
    (out / "STOP").touch()
    if launcher.wait() not in (0, 75):
        raise SystemExit(f"the fault-free run failed; see {out.parent / out.name}.log")


def smooth(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(losses))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults; the run without comes on top")
    parser.add_argument("--steps", type=int, default=20_000, help="of the whole run, more than the time is enough for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "scenes"
    write_dataset(data, 1000, 8, 64, args.seed)

    fire = under_fire(args.out / "fire", data / "train", args.steps, args.minutes, random.Random(args.seed))
    undisturbed(args.out / "calm", data / "train", args.steps, last_step(args.out / "fire"))

    calm_rows = read_lines(args.out / "calm" / "metrics.jsonl")
    calm = {row["step"]: row["loss"] for row in calm_rows}
    step_s = statistics.median(row["step_s"] for row in calm_rows)
    rows = read_lines(args.out / "fire" / "metrics.jsonl")
    twice = [step for step, row in zip(range(1, len(rows) + 1), rows) if row["step"] != step]
    done, lost = len(rows), len(read_lines(args.out / "fire" / "metrics.superseded.jsonl"))
    a, b = smooth([calm[row["step"]] for row in rows]), smooth([row["loss"] for row in rows])
    worst = max((abs(x - y) / x for x, y in zip(a, b)), default=0.0)
    numbers = {
        "steps_done": done,
        "steps_out_of_order": len(twice),
        "steps_lost_and_done_again": lost,
        "faults": sum(fire["faults"].values()),
        "by_kind": fire["faults"],
        "codes": fire["codes"],
        "seconds_to_recover_median": statistics.median(fire["recoveries"]) if fire["recoveries"] else None,
        "seconds_to_recover_worst": max(fire["recoveries"], default=None),
        "loss_worst_relative_difference_of_means_of_20": worst,
        "loss_last_calm": a[-1],
        "loss_last_fire": b[-1],
        "goodput": step_s * done / fire["seconds"],
        "seconds": fire["seconds"],
    }
    print(json.dumps(numbers, indent=1))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0 if not twice else 1


if __name__ == "__main__":
    sys.exit(main())
