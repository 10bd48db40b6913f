"""Who hangs? Readings of signs of life and of stacks, and the watching process on processes that really stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.jsonl import read_lines
from amclip_ds.resilience import watch_ranks

TRAINING = (
    'Current thread 0x1 (most recent call first):\n  File "x/step.py", line 9 in train_step\n'
    '  File "x/__main__.py", line 8 in <module>\n'
)
WAITING = (
    'Thread 0x2 (most recent call first):\n  File "x/threading.py", line 3 in wait\n\n'
    'Current thread 0x1 (most recent call first):\n  File "t/distributed_c10d.py", line 7 in all_reduce\n'
    '  File "x/step.py", line 12 in train_step\n  File "x/__main__.py", line 8 in <module>\n'
)


def rank(number: int, **facts: Any) -> dict[str, Any]:
    usual = {"state": "S", "step": 7, "phase": "step", "stacks": WAITING, "host": "node1", "silent_s": 9.0}
    return {"rank": number} | usual | facts


@pytest.mark.parametrize(
    "odd, why",
    [
        ({"state": ""}, "gone"),
        ({"state": "T"}, "stopped"),
        ({"phase": "data"}, "behind"),
        ({"step": 6}, "behind"),
        ({"stacks": TRAINING}, "the others wait for it"),
    ],
)
def test_the_odd_one_is_blamed(odd: dict[str, Any], why: str) -> None:
    culprits, reported = watch_ranks.blame([rank(0), rank(1), rank(2, **odd), rank(3)])
    assert culprits == [2] and why in reported


def test_a_node_that_is_cut_off_is_blamed() -> None:
    """All wait in the same collective. Where most reach nothing, it is the node where all met."""
    ranks = [rank(number, reaches=number != 3) for number in range(4)]
    assert watch_ranks.blame(ranks) == ([3], "its node does not reach the one where the ranks met")
    ranks = [rank(number, reaches=number == 0) for number in range(4)]
    assert watch_ranks.blame(ranks) == ([0], "no other node reaches it")


def test_whether_the_meeting_is_reached() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert watch_ranks.reaches_meeting("127.0.0.1", port)
    assert not watch_ranks.reaches_meeting("127.0.0.1", port)


def test_nobody_is_singled_out_without_a_difference() -> None:
    assert watch_ranks.blame([rank(0), rank(1)])[0] == [0, 1]


def test_a_line_names_rank_host_phase_and_place() -> None:
    line = watch_ranks.describe([rank(0), rank(1, stacks=TRAINING, host="node2")], [1], "why")
    assert "rank 1 on node2 in phase 'step' after step 7" in line and 'step.py", line 9 in train_step' in line


def test_a_helper_thread_that_waits_is_not_the_training_thread() -> None:
    assert watch_ranks.waits_in_collective(WAITING) and not watch_ranks.waits_in_collective(TRAINING)


SLEEPER = """
import faulthandler, mmap, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import watch_ranks as w
place, rank, limit = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
stacks = (place / f"rank{rank}.stacks").open("w")
faulthandler.register(w.STACKS_SIGNAL, file=stacks, all_threads=True)
path = place / f"rank{rank}.beat"
path.write_bytes(bytes(4096))
file = path.open("r+b")
memory = mmap.mmap(file.fileno(), 4096)
while True:
    now = time.monotonic()
    memory[: w.BEAT.size] = w.BEAT.pack(os.getpid(), w.start_time(os.getpid()), 5, now, limit, b"data")
    if len(sys.argv) > 5:
        while not Path(sys.argv[5]).exists() and time.monotonic() < now + 600:
            time.sleep(0.05)
    time.sleep(0.05)
"""


def start(place: Path, number: int, *more: str, limit_s: float = 5.0) -> subprocess.Popen:
    folder = str(Path(watch_ranks.__file__).parent)
    return subprocess.Popen([sys.executable, "-S", "-c", SLEEPER, folder, str(place), str(number), str(limit_s), *more])


def watching(place: Path, run: Path, ranks: list[int]) -> subprocess.Popen:
    node = {"ranks": ranks, "node": 0, "hosts": ["h"], "meeting": ["", 0]}
    (place / "settings.json").write_text(json.dumps({"run": str(run), "attempt": 4, "poll_s": 0.1} | node))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", watch_ranks.__file__, str(place)], stderr=subprocess.PIPE, text=True
    )


def wait_for_beats(place: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    beats = lambda: [watch_ranks.read_beat(path) or {} for path in place.glob("*.beat")]  # noqa: E731
    while sum(bool(beat.get("pid")) for beat in beats()) < count and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_silent_process_ends_them_all_and_is_named(how: str, tmp_path: Path) -> None:
    place, run = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    run.mkdir()
    ranks = [start(place, 0), start(place, 1, *([str(tmp_path / "never")] if how == "asleep" else []))]
    wait_for_beats(place, 2)
    watcher = watching(place, run, [0, 1])
    if how == "stopped":
        os.kill(ranks[1].pid, signal.SIGSTOP)
    _, printed = watcher.communicate(timeout=60)
    assert watcher.returncode == 1
    assert [process.wait(timeout=10) for process in ranks] == [-signal.SIGKILL] * 2
    [row] = [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert row["kind"] == "hang" and row["key"] == "data" and row["attempt"] == 4
    if how == "stopped":  # a beating rank 0 shows that it is not the one
        assert row["rank"] == 1 and "stopped" in row["cause"]
    kept = (run / "hangs" / "attempt4-node0.txt").read_text()
    assert kept.count("most recent call first") == 2 and "rank 1 on" in kept and "rank 1" in printed


@pytest.mark.slow
def test_processes_that_end_or_beat_are_left_alone(tmp_path: Path) -> None:
    """The twin: no hang, no report, and the watch ends with its ranks."""
    place, run = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    run.mkdir()
    beating = start(place, 0)
    wait_for_beats(place, 1)
    watcher = watching(place, run, [0])
    time.sleep(7)
    assert watcher.poll() is None and beating.poll() is None
    beating.kill()
    beating.wait()
    assert watcher.wait(timeout=20) == 0 and not (run / "incidents.jsonl").exists()


@pytest.mark.slow
def test_a_job_that_was_suspended_has_its_time_anew(tmp_path: Path) -> None:
    """All of it was stopped, its watch too; a rank's first sign of life is then as far as its next step."""
    place, run, go_on = tmp_path / "place", tmp_path / "run", tmp_path / "go on"
    place.mkdir()
    run.mkdir()
    rank = start(place, 0, str(go_on), limit_s=6.0)
    wait_for_beats(place, 1)
    watcher = watching(place, run, [0])
    time.sleep(1)
    for number, seconds in ((signal.SIGSTOP, 7.0), (signal.SIGCONT, 4.0)):
        for process in (watcher, rank):
            process.send_signal(number)
        time.sleep(seconds)
    assert watcher.poll() is None and rank.poll() is None and not (run / "hangs").exists()
    _, printed = watcher.communicate(timeout=60)
    assert watcher.returncode == 1 and "no sign of life" in printed, "the twin: it never comes"
    assert rank.wait(timeout=10) == -signal.SIGKILL


def test_the_others_wait_for_a_rank_that_compiles(tmp_path: Path) -> None:
    """And for as long as a step may take after it; a rank that is silent for longer ends the run."""
    ranks = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]

    def beat(rank: int, phase: str, limit_s: float) -> None:
        pid = ranks[rank].pid
        row = watch_ranks.BEAT.pack(pid, watch_ranks.start_time(pid), 5, time.monotonic(), limit_s, phase.encode())
        (place / f"rank{rank}.beat").write_bytes(row)

    place, run = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    run.mkdir()
    settings = {"run": str(run), "attempt": 0, "ranks": [0, 1], "node": 0, "hosts": ["here"], "poll_s": 0.05}
    (place / "settings.json").write_text(json.dumps(settings))
    beat(0, "compile", 60.0)
    beat(1, "step", 1.0)
    watch = subprocess.Popen([sys.executable, "-I", "-S", watch_ranks.__file__, str(place)])
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            watch.wait(timeout=3.0)
        beat(0, "step", 60.0)
        began = time.monotonic()
        assert watch.wait(timeout=20.0) == 1 and time.monotonic() - began > 0.8
    finally:
        for process in (watch, *ranks):
            process.kill()
            process.wait()
    [row] = read_lines(run / "incidents.jsonl")
    assert row["kind"] == "hang" and "phase 'step'" in row["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hangs/attempt4-node0.txt", "hangs/.attempt4-node0.json.partial"])
def test_a_file_system_that_hangs_too_keeps_no_rank_alive(name: str, tmp_path: Path) -> None:
    """A pipe that nobody reads: whoever opens it to write waits for ever."""
    place, run = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    (run / "hangs").mkdir(parents=True)
    os.mkfifo(run / name)
    silent = start(place, 0, str(tmp_path / "never"), limit_s=1.0)
    wait_for_beats(place, 1)
    _, printed = watching(place, run, [0]).communicate(timeout=90)
    assert silent.wait(timeout=10) == -signal.SIGKILL
    assert "cannot be written: no answer within" in printed and "rank 0 on" in printed
    [row] = [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert row["kind"] == "hang"


@pytest.mark.slow
def test_a_rank_that_is_well_again_before_its_report_is_written_is_left_alone(tmp_path: Path) -> None:
    """A file system's pause, which the rank and the report waited for alike."""
    place, run, again = tmp_path / "place", tmp_path / "run", tmp_path / "again"
    place.mkdir()
    (run / "hangs").mkdir(parents=True)
    pipe = run / "hangs" / "attempt4-node0.txt"
    os.mkfifo(pipe)
    rank = start(place, 0, str(again))
    wait_for_beats(place, 1)
    watcher = watching(place, run, [0])
    deadline = time.monotonic() + 30
    while not (place / "rank0.stacks").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    again.touch()
    time.sleep(0.5)
    assert "rank 0 on" in pipe.read_text()
    time.sleep(2.0)
    assert rank.poll() is None and watcher.poll() is None and not (run / "incidents.jsonl").exists()
    rank.kill()
    rank.wait()
    _, printed = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and "well again" in printed
