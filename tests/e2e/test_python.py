"""The Python interface in a program as a user writes it: no guard round the trainings, several of them, one stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amclip_ds import run_files
from amclip_ds.jsonl import read_lines
from tests.e2e.trainers import tiny

PROGRAM = """
import gc, os, signal, sys, threading, time
import torch
import amclip_ds
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored

def train(out, *more):
    words = {word.partition("=")[0]: word for word in [*sys.argv[2:], f"run.out={out}", *more]}
    try:
        amclip_ds.train(amclip_ds.load_config(sys.argv[1], [*words.values()]))
    except amclip_ds.AmclipError as error:
        print("stopped:", error)

def program():
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "CUBLAS_WORKSPACE_CONFIG"
    of_torch = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    return [os.environ.get(name) for name in names], of_torch, sys.excepthook

def press():
    while "deepspeed.ops" not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

before = program()
threading.Thread(target=press).start()
try:
    train("cut")
except KeyboardInterrupt:
    print("Ctrl-C:", program() == before)
train("whole")
print("whole:", program() == before)
torch.ones(1 << 29)  # 2 GiB
train("parts", "run.time_limit=00:00:01")
print("signals:", *(signal.getsignal(number).__name__ if number == signal.SIGINT else signal.getsignal(number).name
                    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)))
train("parts")
train("zero3", "engine.deepspeed=zero3_fp32.json", "run.steps=2")
from deepspeed.runtime.engine import DeepSpeedEngine
print("left:", sum(isinstance(one, DeepSpeedEngine) for one in gc.get_objects()), "engines,", program() == before)
raise ValueError("of the program")
"""


@pytest.mark.timeout(900)
def test_a_program_trains_as_often_as_it_likes(scenes: Path, tmp_path: Path) -> None:
    """Each training in a world of its own: a stop costs the program neither Ctrl-C nor its life, workers do not run the
    program again, a start is counted from its own begin, and what was set for one, or held, is none of the next's."""
    words = [word for word in tiny(scenes, tmp_path) if not word.startswith(("run.out=", "data.workers="))]
    (tmp_path / "program.py").write_text(PROGRAM)
    argv = [sys.executable, "program.py", *words, "data.workers=1"]
    env = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=800, env=env)
    printed = done.stdout + done.stderr
    assert "Ctrl-C: True" in done.stdout and "whole: True" in done.stdout, printed
    assert printed.count("stopped: run.time_limit=00:00:01 is near; stopped after step ") == 1, printed
    assert "signals: SIG_DFL SIG_DFL default_int_handler" in done.stdout
    assert "left: 0 engines, True" in done.stdout
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: of the program", printed
    whole, parts = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_lines(tmp_path / name / run_files.METRICS)]
        for name in ("whole", "parts")
    )
    assert whole == parts and len(whole) > 3
    assert max(row["peak_memory_gib"] for row in read_lines(tmp_path / "parts" / run_files.METRICS)) < 2.0
    events = read_lines(tmp_path / "parts" / run_files.TIMELINE)
    first, second = (row for row in events if row["event"] == "start")
    ended = max(row["time"] for row in events if row["attempt"] == first["attempt"])
    assert second["time"] - second["before_s"] >= ended - 0.01


TWO_STAGES = """
import sys
import amclip_ds

for recipe, out, *more in (("clipa-pre-tiny", "first"), ("clipa-tune-tiny", "second", "model.init_from=first")):
    amclip_ds.train(amclip_ds.load_config(recipe, [*sys.argv[1:], f"run.out={out}", *more]))
sys.excepthook(ValueError, ValueError("of the program"), None)
"""


@pytest.mark.timeout(900)
def test_ranks_of_a_launcher_train_again(scenes: Path, tmp_path: Path) -> None:
    """The second training meets where the first one's words are still to be read: torchrun keeps the store. An error of
    the program says its rank, once."""
    (tmp_path / "program.py").write_text(TWO_STAGES)
    words = [f"data.train={scenes}/train", "run.steps=3", "batch.global_size=8", "data.workers=1", "log.every_steps=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    argv = [*torchrun, "--rdzv-endpoint", "127.0.0.1:0", "program.py", *words]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [read_lines(tmp_path / name / run_files.METRICS) for name in ("first", "second")]
    assert [len(of) for of in rows] == [3, 3]
    shown = sorted(line for line in done.stderr.splitlines() if "of the program" in line)
    assert shown == [f"[rank{rank}]: ValueError: of the program" for rank in (0, 1)], done.stderr
