"""A run under fire: `python -m benchmarks.soak --out DIR [--minutes 30] [--seed 0]`.

First the run with faults, one a minute, at a second of it that is drawn: some strike while the run starts. Faults:
SIGKILL of one rank or of all (which the launcher starts again, --max-restarts), of the launcher, SIGTERM to it, SIGUSR1
to one rank, a STOP file (after which it is launched again). Each launch has a world size (1 to 3) and a ZeRO stage (1
to 3) by chance. Then the same run without faults, on 2 ranks at stage 2, as far as the first one came.

Printed: where the time went, by part; the parts of a restart, from the fault to the end of the first new step, cold
(another launch) and warm (the launcher's own); steps that were lost and done again; the loss curve against the calm
one; goodput, three times: the time of the steps kept (as `amclip report` has it), the same at each attempt's median
pace, and at the calm run's pace, over the time it took.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from amclip_ds.data.synthetic import write_dataset
from amclip_ds.jsonl import read_lines
from amclip_ds.report import time_spent
from amclip_ds.report.read import read_run

TO_RANKS = ("kill one rank", "kill all ranks", "SIGUSR1 to one rank")
FAULTS = (*TO_RANKS, "kill the launcher", "SIGTERM", "STOP file")
RESTARTED_BY_LAUNCHER = ("kill one rank", "kill all ranks")
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
ENDINGS = (0, 75, -signal.SIGKILL, -signal.SIGTERM)  # of a launcher; the last of one that had hardly begun
WINDOW = 20
PHASES = ("verify", "index", "build", "resume", "first_batch")


@dataclass
class Fault:
    """One of them. Times in seconds since the epoch."""

    kind: str
    at: float
    gone: float | None = None
    """when the launcher had ended; None where it continues"""


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
        "--max-restarts",
        "1000",
    ]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def last_step(out: Path) -> int:
    rows = read_lines(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The trainers under a launcher, without their loaders and writers."""
    try:
        return [child for child in psutil.Process(launcher.pid).children() if "amclip_ds" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def strike(launcher: subprocess.Popen, out: Path, dice: random.Random) -> Fault:
    """Does one of those that are possible now; waits for the launcher to end where it will."""
    ranks = ranks_of(launcher)
    kind = dice.choice(FAULTS if ranks else [kind for kind in FAULTS if kind not in TO_RANKS])
    fault = Fault(kind, time.time())
    try:
        if kind == "kill one rank":
            dice.choice(ranks).kill()
        elif kind == "kill all ranks":
            for rank in ranks:
                rank.kill()
        elif kind == "kill the launcher":
            launcher.kill()
        elif kind == "SIGTERM":
            launcher.terminate()
        elif kind == "SIGUSR1 to one rank":
            dice.choice(ranks).send_signal(signal.SIGUSR1)
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / "STOP").touch()
    except psutil.NoSuchProcess:
        pass  # it ended by itself a moment ago
    if kind not in RESTARTED_BY_LAUNCHER:
        launcher.wait(timeout=300)
        fault.gone = time.time()
    return fault


def under_fire(out: Path, data: Path, steps: int, minutes: int, dice: random.Random) -> dict[str, Any]:
    """Runs for so many minutes, then stops the run. Returns what happened."""
    began = time.monotonic()
    due = [60 * (minute + dice.random()) for minute in range(minutes)]
    faults: list[Fault] = []
    codes: list[int] = []
    launcher = None
    try:
        while (now := time.monotonic() - began) < 60 * minutes:
            if launcher is None:
                launcher = start(out, data, steps, dice.randint(1, 3), dice.randint(1, 3))
            if due and now >= due[0] and launcher.poll() is None:
                due.pop(0)
                faults.append(strike(launcher, out, dice))
            if launcher.poll() is not None:
                codes.append(launcher.returncode)
                if launcher.returncode not in ENDINGS:
                    raise SystemExit(f"the run ended with code {launcher.returncode}; see {out.parent / out.name}.log")
                launcher = None
            time.sleep(0.05)
        seconds = time.monotonic() - began
    finally:
        if launcher is not None:
            launcher.terminate()
            codes.append(launcher.wait(timeout=300))
    return {"seconds": seconds, "until": time.time(), "faults": faults, "codes": codes}


def restarts(out: Path, faults: list[Fault]) -> dict[str, list[dict[str, float]]]:
    """By kind, cold or warm, each restart that came to a step: part -> seconds, from the fault on."""
    first_rows: dict[int, float] = {}
    for name in ("metrics.superseded.jsonl", "metrics.jsonl"):
        for row in read_lines(out / name):
            first_rows[row["attempt"]] = min(row["time"], first_rows.get(row["attempt"], row["time"]))
    timeline = read_lines(out / "timeline.jsonl")
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for fault, following in zip(faults, [*faults[1:], None]):
        since, until = fault.gone or fault.at, following.at if following else time.time()
        starts = [row for row in timeline if row["event"] == "start" and row["time"] < until]
        begun = [row for row in starts if row["time"] - row["before_s"] > since]  # others began before the fault
        if not begun or not fault.at < first_rows.get(begun[-1]["attempt"], 0.0) < until:
            continue  # the next fault came before the first step
        rows = [row for row in timeline if row["attempt"] == begun[-1]["attempt"]]
        first_step = first_rows[begun[-1]["attempt"]]
        process = begun[-1]["time"] - begun[-1]["before_s"]
        parts = {"stop: step, save, exit" if fault.gone else "notice the loss": (fault.gone or process) - fault.at}
        if fault.gone:
            parts["launcher: imports"] = process - fault.gone
        parts["rank: imports and meeting"] = begun[-1]["before_s"]
        parts |= {phase: sum(row["seconds"] for row in rows if row["event"] == phase) for phase in PHASES}
        parts["first step and the rest"] = first_step - fault.at - sum(parts.values())
        parts["in all"] = first_step - fault.at
        found["cold" if fault.gone else "warm"].append(parts)
    return found


def own_pace(out: Path) -> float:
    """Seconds of the steps kept, each at its attempt's median."""
    by_attempt: dict[int, list[float]] = {}
    for row in read_lines(out / "metrics.jsonl"):
        by_attempt.setdefault(row["attempt"], []).append(row["step_s"])
    return sum(len(steps) * statistics.median(steps) for steps in by_attempt.values())


def undisturbed(out: Path, data: Path, steps: int, until: int) -> None:
    """The run without faults, stopped by a STOP file once it is as far."""
    launcher = start(out, data, steps, 2, 2)
    while launcher.poll() is None and last_step(out) < until:
        time.sleep(2.0)
    (out / "STOP").touch()
    if launcher.wait() not in (0, 75):
        raise SystemExit(f"the fault-free run failed; see {out.parent / out.name}.log")


def smooth(losses: Sequence[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(losses))]


def against_calm(out: Path, calm: Path, seconds: float) -> dict[str, float]:
    """The run's losses and pace against the calm one's."""
    calm_rows, rows = read_lines(calm / "metrics.jsonl"), read_lines(out / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in calm_rows}
    a, b = smooth([losses[row["step"]] for row in rows]), smooth([row["loss"] for row in rows])
    return {
        "loss_worst_relative_difference_of_means_of_20": max((abs(x - y) / x for x, y in zip(a, b)), default=0.0),
        "loss_last_calm": a[-1],
        "loss_last_fire": b[-1],
        "goodput_at_the_calm_pace": statistics.median(row["step_s"] for row in calm_rows) * len(rows) / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=int, default=30, help="of faults; the run without comes on top")
    parser.add_argument("--steps", type=int, default=20_000, help="of the whole run, more than the time is enough for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-calm", action="store_true", help="without the fault-free run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data, run = args.out / "scenes", args.out / "fire"
    write_dataset(data, 1000, 8, 64, args.seed)

    fire = under_fire(run, data / "train", args.steps, args.minutes, random.Random(args.seed))
    rows = read_lines(run / "metrics.jsonl")
    out_of_order = [step for step, row in enumerate(rows, 1) if row["step"] != step]
    kinds = [fault.kind for fault in fire["faults"]]
    again = restarts(run, fire["faults"])
    parts = time_spent.total(time_spent.attempts_of(read_run(run)))
    numbers = {
        "seconds": fire["seconds"],
        "faults": [asdict(fault) for fault in fire["faults"]],
        "by_kind": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "codes": fire["codes"],
        "steps_done": len(rows),
        "steps_out_of_order": len(out_of_order),
        "steps_lost_and_done_again": len(read_lines(run / "metrics.superseded.jsonl")),
        "parts_s": parts,
        "restarts": again,
        "goodput": time_spent.goodput(parts),
        "goodput_at_the_median_pace": own_pace(run) / fire["seconds"],
        "load_at_end": os.getloadavg()[0],
    }
    if not args.no_calm:
        undisturbed(args.out / "calm", data / "train", args.steps, last_step(run))
        numbers |= against_calm(run, args.out / "calm", fire["seconds"])
    show(numbers)
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0 if not out_of_order else 1


def show(numbers: dict[str, Any]) -> None:
    print("| where the time went | s | share |\n|---|---|---|")
    whole = sum(numbers["parts_s"].values())
    for part, seconds in numbers["parts_s"].items():
        print(f"| {time_spent.PARTS[part]} | {seconds:.0f} | {100 * seconds / whole:.1f}% |")
    print("\n| a restart, median s | " + " | ".join(f"{k} ({len(v)})" for k, v in numbers["restarts"].items()) + " |")
    print("|---|---|---|")
    named = dict.fromkeys(part for found in numbers["restarts"].values() for parts in found for part in parts)
    for part in sorted(named, key=lambda part: part == "in all"):
        columns = [[parts[part] for parts in found if part in parts] for found in numbers["restarts"].values()]
        print(f"| {part} | " + " | ".join(f"{statistics.median(of):.2f}" if of else "" for of in columns) + " |")
    print()
    for name, value in numbers.items():
        if name not in ("parts_s", "restarts", "faults"):
            print(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
