"""A run through everything that small may go wrong: `python -m tests.e2e.ordeal SCENES FOLDER STEPS`.

FOLDER is a small file system of its own, and is filled. Prints one JSON object for test_ordeal.py. With --rank in front
it is one rank, on which the calamities happen: rank 0 brings them about between two steps, at fixed steps.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

from amclip_ds.jsonl import read_lines
from amclip_ds.record import backlog


def calamities(steps: int, folder: Path) -> dict[int, Any]:
    """After how many steps what happens. Saves are due every tenth of the run, evaluations every fifth. What returns
    False could not happen yet, and is tried again a step later."""
    part, tar, fill = steps // 20, folder / "set" / "test" / "0.tar", folder / "fill"

    def fill_the_disk(saved: int) -> bool:
        folder_of_it, until = folder / "run" / "checkpoints" / f"step_{saved:08d}", time.monotonic() + 20
        while not folder_of_it.exists():  # what is being written is to be committed, and that happens between steps
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        with contextlib.suppress(OSError), fill.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        return True

    def break_the_set() -> None:
        tar.rename(f"{tar}.whole")

    def fix_the_set() -> None:
        Path(f"{tar}.whole").rename(tar)

    def kill_children(word: str) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it is gone by now
                if word in " ".join(child.cmdline()):
                    child.kill()

    def kill_the_server() -> None:
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]

    return {
        2 * part + 1: lambda: fill_the_disk(2 * part),  # one save is due meanwhile, and cannot be made
        5 * part - 1: fill.unlink,
        7 * part: break_the_set,
        8 * part + 1: fix_the_set,
        9 * part: lambda: shutil.rmtree(folder / "run" / "tensorboard"),
        10 * part + 1: lambda: kill_children("forkserver"),
        11 * part: kill_the_server,
        11 * part + 1: lambda: kill_children("watch_ranks"),
        12 * part + 1: lambda: fill_the_disk(12 * part),
        15 * part - 1: fill.unlink,  # again one save is not made
        15 * part: lambda: os.kill(os.getppid(), signal.SIGHUP),
    }


def rank(argv: list[str]) -> int:
    """One rank of the run."""
    from amclip_ds.cli import main
    from amclip_ds.data.loader import TrainingData

    folder, steps, *words = argv
    due = calamities(int(steps), Path(folder)) if os.environ["RANK"] == "0" and Path(folder, "set").exists() else {}
    batches = TrainingData.batches

    def disturbed(self: TrainingData, cursor: dict | None) -> Iterator:
        done = cursor["epoch"] * self.steps_per_epoch + cursor["step"] if cursor else 0
        for number, batch in enumerate(batches(self, cursor), done):
            if number in due and number > done and due[number]() is False:
                due[number + 1] = due[number]
            yield batch

    TrainingData.batches = disturbed  # type: ignore[method-assign]
    backlog.RETRY_S = 0.05
    return main(words)


def train(scenes: str, folder: Path, steps: int) -> int:
    """The run in FOLDER/run, its output into a pipe that nobody reads for long."""
    words = [
        "train",
        "aclip-tiny",
        f"data.train={scenes}/train",
        f"run.out={folder / 'run'}",
        f"run.steps={steps}",
        "batch.global_size=8",
        "data.workers=1",
        "log.every_steps=1",
        "run.log_sample_ids=true",
        f"checkpoint.every_steps={steps // 10}",
        "checkpoint.keep_last=1",
        "heads.hidden_dim=32",
        "optim.warmup_steps=2",
        "engine.deepspeed=zero2_fp32.json",
    ]
    if (folder / "set").exists():
        words += [f"eval.data={folder / 'set'}", f"eval.every_steps={steps // 5}", "eval.batch_size=4"]
    program = (
        "import sys; from amclip_ds.launch import run_ranks; from amclip_ds.output import make_steady; make_steady();"
        "sys.exit(run_ranks([sys.executable, '-m', 'tests.e2e.ordeal', '--rank', *sys.argv[2:]], 2, sys.argv[1],"
        " listens=True))"
    )
    reader = subprocess.Popen(["head", "-n", "2"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert reader.stdin
    argv = [sys.executable, "-c", program, str(folder / "run"), str(folder), str(steps), *words]
    process = subprocess.Popen(argv, stdout=reader.stdin)
    reader.stdin.close()
    return process.wait()


def outcome(folder: Path) -> dict[str, Any]:
    """What a run left behind."""
    run = folder / "run"
    rows = read_lines(run / "metrics.jsonl")
    log = (run / "out.log").read_text()
    return {
        "losses": [row["loss"] for row in rows],
        "steps": [row["step"] for row in rows],
        "ids": [row["ids"] for row in read_lines(run / "sample_ids.jsonl")],
        "committed": [int(line.split("step_")[1][:8]) for line in log.splitlines() if "committed after" in line],
        "evaluated": sorted({row["step"] for row in read_lines(run / "eval.jsonl")}),
        "incidents": [
            (row["kind"], row["step"], row["cause"], row["action"]) for row in read_lines(run / "incidents.jsonl")
        ],
        "verdict": json.loads((run / "exit.json").read_text()),
        "files": sorted(path.name for path in run.iterdir()),
    }


def main(scenes: str, folder: Path, steps: int) -> dict[str, Any]:
    from tests.unit.evaluate.test_encoder import write_set

    codes = [train(scenes, folder / "calm", steps)]
    calm = outcome(folder / "calm")
    shutil.rmtree(folder / "calm")
    write_set(folder / "set", num_images=8)
    while len(codes) < 5 and codes[-1] in (75,) or len(codes) == 1:
        codes.append(train(scenes, folder, steps))
    return {"codes": codes, "calm": calm, "ordeal": outcome(folder)}


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        sys.exit(rank(sys.argv[2:]))
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
