"""The server of the loader's workers as a fork of a rank that is one itself (commands/train.py)."""

import subprocess
import sys
import time
from pathlib import Path

from amclip_ds.resilience.watch_ranks import process_state

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import os, signal
from multiprocessing import forkserver
from amclip_ds.data.workers import Workers, fork_worker_server
from amclip_ds.signals import STOPPING

if __name__ == "__main__":
    heard = []
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    os.kill(os.getpid(), signal.SIGTERM)
    fork_worker_server()
    server = forkserver._forkserver._forkserver_pid
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    places = iter([(0, 3, 1), (5, 0, 2), (0, 0, 0)])
    workers = Workers(max, places, number=1, ahead=1, timeout_s=60, died=print)
    print(heard == [signal.SIGTERM], workers.next(), workers.next(), server == forkserver._forkserver._forkserver_pid)
    print(server)
"""


def test_a_forked_server_keeps_signals_for_its_rank_and_ends_with_it() -> None:
    """One that came before the rank could listen does not end it; the worker is that server's."""
    done = subprocess.run([sys.executable, "-c", RANK], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, server = done.stdout.splitlines()
    assert first == "True 3 5 True"
    deadline = time.monotonic() + 60
    while process_state(int(server), 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process_state(int(server), 0)
