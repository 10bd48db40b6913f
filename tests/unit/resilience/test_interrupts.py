"""Ctrl-C: the first asks for a save, a second before the first step quits, later ones lose nothing. Under srun a stop
before the first step ends a rank at once."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amclip_ds.resilience.config import PreemptionConfig
from amclip_ds.resilience.preemption import Preemption
from amclip_ds.signals import STOP_FILE
from tests.unit.data.shards import write_shards

LISTENER = """
import os, signal, sys, time
from amclip_ds.resilience import preemption
arrivals = preemption.listen(forced_exit_s=30)
arrivals.is_starting = sys.argv[1] == "starting"
for number in sys.argv[2].split(","):
    os.kill(os.getpid(), getattr(signal, number))
    time.sleep(0.2)
print("alive")
os._exit(0)
"""


def listener(when: str, signals: str) -> tuple[int, str]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LISTENER, when, signals], capture_output=True, text=True, timeout=60)
    print(f"{time.monotonic() - began:.1f} s")
    return done.returncode, done.stdout + done.stderr


def test_a_second_ctrl_c_during_the_start_quits() -> None:
    code, printed = listener("starting", "SIGINT,SIGINT")
    assert code == 130 and "alive" not in printed
    assert "Ctrl-C again quits at once" in printed and "the same command starts again" in printed


def test_other_signals_and_a_run_with_steps_are_not_quit() -> None:
    """The twins: what has something to save continues to save it."""
    for when, signals in (("starting", "SIGTERM,SIGTERM"), ("training", "SIGINT,SIGINT,SIGINT")):
        code, printed = listener(when, signals)
        assert code == 0 and "alive" in printed and printed.count("saving and stopping") == 1


RANK = """
import os, signal, sys, time
from amclip_ds.resilience import preemption
preemption.LEAVE_AFTER_S = 1.0
arrivals = preemption.listen(leaves_early=True)
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.3)
arrivals.is_starting = sys.argv[1] != "its first step ends meanwhile"
if sys.argv[1] == "the others have left":
    raise RuntimeError("connection closed by peer")
time.sleep(2)
print("alive")
sys.exit(7)
"""


def test_a_rank_leaves_before_its_first_step_with_code_0() -> None:
    """Also where it fails since another one has left before it; a step that ends meanwhile is to be saved."""
    for when, code in (("it waits", 0), ("the others have left", 0), ("its first step ends meanwhile", 7)):
        done = subprocess.run([sys.executable, "-c", RANK, when], capture_output=True, text=True, timeout=60)
        assert done.returncode == code and ("alive" in done.stdout) == bool(code), (when, done.stderr)
        assert done.stderr.count("before the first step there is nothing to save; leaving") == 1


def test_a_task_of_srun_is_such_a_rank(tmp_path: Path) -> None:
    """The command itself, stopped where it loads torch: its job's time may end before an index does."""
    task = {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "STEP_NODELIST": "node1", "STEP_ID": "0", "NTASKS": "1"}
    env = os.environ | {f"SLURM_{name}": value for name, value in task.items()} | {"SLURM_STEP_TASKS_PER_NODE": "1"}
    write_shards(tmp_path, (4,))
    words = ["clip-tiny", f"data.train={tmp_path}/0.tar", f"run.out={tmp_path}/run"]
    rank = subprocess.Popen(
        [sys.executable, "-m", "amclip_ds", "train", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert rank.stdout is not None and b"loading torch" in rank.stdout.readline()
    rank.send_signal(signal.SIGUSR1)
    printed = rank.communicate(timeout=60)[0]
    assert rank.returncode == 0 and b"SIGUSR1: before the first step" in printed, printed
    assert not (tmp_path / "run" / "exit.json").exists()


ALONE: Any = SimpleNamespace(rank=0, world_size=1, is_main=True, device=SimpleNamespace(type="cpu"))


def test_trouble_of_the_file_system_is_no_stop_and_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for twice a second: an evicted client's errors reach the ask sooner or later."""
    monkeypatch.setattr("amclip_ds.resilience.preemption.CHECK_EVERY_S", 0.0)
    (tmp_path / "STOP").touch()
    with Preemption(PreemptionConfig(), tmp_path, ALONE) as stops:
        with monkeypatch.context() as troubled:
            call = os.stat

            def failing(path: Any, *words: Any, **more: Any) -> os.stat_result:
                if str(path) == str(tmp_path / "STOP"):
                    raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), str(path))
                return call(path, *words, **more)

            troubled.setattr(os, "stat", failing)
            assert stops.agreed() is None
        assert stops.agreed() == STOP_FILE


PROGRAM = """
import os, signal, sys, time
from contextlib import nullcontext
from amclip_ds.resilience import preemption
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
with preemption.restoring_signals() if sys.argv[1] == "restoring" else nullcontext():
    arrivals = preemption.listen(forced_exit_s=2)
    os.kill(os.getpid(), signal.SIGINT)
    while arrivals.first is None:
        time.sleep(0.01)
    arrivals.close()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM), flush=True)
time.sleep(3)
print("alive", flush=True)
"""


@pytest.mark.parametrize(("how", "code", "printed"), [("restoring", 0, "True 0\nalive\n"), ("bare", 1, "False 1\n")])
def test_a_program_outlives_a_training_that_was_stopped(how: str, code: int, printed: str) -> None:
    """The twin is a process that ends with its training: a late signal must not take its code's place, and its end has
    a time limit."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, printed), done.stderr


def test_a_wish_that_comes_in_the_last_step_is_not_left_for_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    with Preemption(PreemptionConfig(), tmp_path, ALONE) as stops:
        assert stops.agreed(is_last=True) is None
    assert not (tmp_path / "STOP").exists()
