"""Ctrl-C: the first asks for a save, a second before the first step quits, later ones lose nothing."""

import subprocess
import sys
import time

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
