"""Trainers as real processes, for tests that send them signals: started, followed by their records, searched."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from amclip_ds.jsonl import read_lines

STEPS = 24


def tiny(scenes: Path, out: Path, *more: str) -> list[str]:
    """RECIPE key=value ... of a short, repeatable run: ZeRO-2, fp32."""
    words = [
        "aclip-tiny",
        f"data.train={scenes}/train",
        f"run.out={out}",
        f"run.steps={STEPS}",
        "batch.global_size=24",
        "engine.deepspeed=zero2_fp32.json",
        "data.workers=0",
        "log.every_steps=1",
        "log.tensorboard=false",
        "optim.warmup_steps=5",
        "checkpoint.every_steps=8",
        "checkpoint.keep_last=20",
        "run.deterministic=true",
        "run.log_sample_ids=true",
        *more,
    ]
    return last_of_each(words)


def last_of_each(words: list[str]) -> list[str]:
    """The words, of each key the last one: a command line takes a key once."""
    return list({word.partition("=")[0]: word for word in words}.values())


class Trainer:
    """`amclip train ...` as a user starts it, alone or with --procs."""

    def __init__(self, run: Path, words: list[str], procs: int | None = 2) -> None:
        self.run = run
        run.parent.mkdir(parents=True, exist_ok=True)
        self.log = run.parent / f"{run.name}-{time.monotonic_ns()}.log"
        self.marker = f"AMCLIP_TEST_MARKER={time.monotonic_ns()}"
        name, value = self.marker.split("=")
        command = [sys.executable, "-m", "amclip_ds", "train", *words, *(["--procs", str(procs)] if procs else [])]
        env = os.environ | {name: value, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, what: str, ask: Any, timeout_s: float = 600) -> None:
        """Waits until ask() is true; fails with what was printed if the trainer ends or time does."""
        deadline = time.monotonic() + timeout_s
        while not ask():
            assert self.process.poll() is None, f"ended before {what}:\n{self.printed()}"
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.printed()}"
            time.sleep(0.02)

    def wait_step(self, step: int, timeout_s: float = 600) -> None:
        """Waits until this step has been logged."""
        self.wait_for(
            f"step {step}",
            lambda: any(row["step"] >= step for row in read_lines(self.run / "metrics.jsonl")),
            timeout_s,
        )

    def end(self, timeout_s: float = 600) -> int:
        """Waits for the end. Returns the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end:\n{self.printed()}") from None

    def kill(self) -> None:
        """Ends whatever is left."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):  # gone since it was listed
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def living(self) -> list[int]:
        """Every living process that this trainer started, itself included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(") ")[2][0]
                except OSError:
                    continue
                if self.marker.encode() in environment and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def left_behind(self, patience_s: float = 20) -> list[str]:
        """The commands of processes that outlive the trainer by more than `patience_s`."""
        deadline = time.monotonic() + patience_s
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.1)
        return [command.replace("\0", " ") for _, command in self._commands()]

    def _commands(self) -> list[tuple[int, str]]:
        """(pid, command line) of the living processes."""
        found = []
        for pid in self.living():
            with contextlib.suppress(OSError):  # gone since it was listed
                found.append((pid, Path(f"/proc/{pid}/cmdline").read_text()))
        return found

    def rank(self, number: int) -> int:
        """The process of a rank: the launcher's children, in the order of their start."""
        pids = []
        for pid, command in self._commands():
            if "train" in command.split("\0") and _parent(pid) == self.process.pid:
                pids.append(pid)
        assert number < len(pids), f"rank {number} is not there:\n{self.printed()}"
        return sorted(pids)[number]


def _parent(pid: int) -> int:
    """The parent of a process, 0 where it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return 0


def verdict(run: Path) -> dict[str, Any]:
    return json.loads((run / "exit.json").read_text())


def checkpoints(run: Path) -> list[int]:
    """The steps of the committed checkpoints."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def outcome(run: Path) -> dict[str, Any]:
    """What two runs that are the same must have in common, bit for bit."""
    rows = read_lines(run / "metrics.jsonl")
    return {
        "losses": [(row["step"], row["loss"], row["lr"], row["momentum"]) for row in rows],
        "ids": [(row["step"], row["ids"]) for row in read_lines(run / "sample_ids.jsonl")],
        "weights": {path.name: path.read_bytes() for path in sorted(run.glob("*.safetensors"))},
    }
