"""CPU seconds and modules of `amclip train aclip-tiny` to the end of its first step, of checkouts side by side.

    python -m benchmarks.start [CHECKOUT ...] [--runs 5] [--procs 2] [--warm] [--set data.workers=2]

CPU is user and system time of the trainer and all processes below it, read when the line of the first step is printed;
the checkouts take turns, so that the machine's load is the same for all. One thread. Modules: sys.modules then.
--warm: a rank is killed after that, and the restart by --max-restarts counted up to its first step, instead.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parents[1]
COUNTED = """
import runpy, sys
try:
    from amclip_ds.record import timeline
except ImportError:  # an older checkout
    from amclip_ds import timeline
first_step = timeline.Timeline.first_step
def counted(self):
    line = first_step(self)
    return line and f"{line} {len(sys.modules)} modules"
timeline.Timeline.first_step = counted
sys.argv[0] = "amclip"
runpy.run_module("amclip_ds", run_name="__main__")
"""


def first_step(
    checkout: Path, shards: Path, out: Path, overrides: list[str], procs: int, warm: bool
) -> tuple[float, int]:
    """(CPU seconds, modules) of one start."""
    command = [sys.executable, "-c", COUNTED, "train", "aclip-tiny", f"data.train={shards}", f"run.out={out}"]
    command += [f"run.steps={1000 if warm else 2}", *overrides, *(["--procs", str(procs)] if procs else [])]
    process = subprocess.Popen(
        command + (["--max-restarts", "1"] if warm else []),
        env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    ended: dict[int, float] = {}  # what a process that is gone had used when last seen
    watching = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, ended, watching))
    watcher.start()
    starts: list[tuple[float, int | None]] = []
    try:
        for line in process.stdout:
            if not line.startswith("start: "):
                continue
            count(process.pid, ended)
            starts.append((sum(ended.values()), int(line.split()[-2]) if line.rstrip().endswith("modules") else None))
            if warm and len(starts) == 1:
                max(psutil.Process(process.pid).children(), key=lambda rank: rank.pid).kill()
            elif warm:
                process.terminate()
    finally:
        watching.set()
        watcher.join()
    if process.wait() not in (0, 75) or len(starts) != 1 + warm:
        raise SystemExit(f"{checkout}: exit {process.returncode}, no first step")
    return starts[-1][0] - (starts[0][0] if warm else 0.0), starts[-1][1]


def watch(root: int, ended: dict[int, float], end: threading.Event) -> None:
    while not end.wait(0.2):
        count(root, ended)


def count(root: int, seconds: dict[int, float]) -> None:
    """CPU of a process and all below it."""
    try:
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[HERE])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--procs", type=int, default=0)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    found: dict[Path, list[tuple[float, int | None]]] = {checkout.resolve(): [] for checkout in args.checkouts}
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder, "scenes")
        synth = [
            sys.executable,
            "-m",
            "amclip_ds",
            "data",
            "synth",
            "--out",
            str(scenes),
            "--train",
            "600",
            "--test",
            "8",
        ]
        subprocess.run([*synth, "--test", "8"], cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)}, check=True)
        for run in range(args.runs):
            for place, (checkout, starts) in enumerate(found.items()):
                out = Path(folder, f"run-{run}-{place}")
                starts.append(first_step(checkout, scenes / "train", out, args.set, args.procs, args.warm))
    for checkout, starts in found.items():
        cpu = [seconds for seconds, _ in starts]
        print(
            f"{checkout}: median {statistics.median(cpu):.2f} s of CPU ({min(cpu):.2f} to {max(cpu):.2f}, {len(cpu)}"
            f" starts), {starts[-1][1]} modules; load {os.getloadavg()[0]:.0f}"
        )


if __name__ == "__main__":
    main()
