"""`--procs`: ranks start, hear a signal once, end together; the verdict is the run's, not a status."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from amclip_ds.cli import main
from amclip_ds.launch import run_ranks, train_ranks

HEAD = """
import json, os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
heard = []
def listen():
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: heard.append(signal.Signals(n).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT))
def wait(seconds=30, until=lambda: heard):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.02)
"""


def ranks_of(body: str, folder: Path) -> list[str]:
    """The command of ranks that run `body`."""
    return [sys.executable, "-S", "-c", HEAD + textwrap.dedent(body), str(folder)]


def signal_when(path: Path, *numbers: signal.Signals) -> threading.Thread:
    """Sends signals to this process, the launcher, once a file is there."""

    def send() -> None:
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        (path.parent / "sent").touch()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    body = """
    (folder / f"{rank}.json").write_text(json.dumps({k: os.environ.get(k) for k in ("WORLD_SIZE", "LOCAL_RANK",
                                                    "MASTER_PORT", "AMCLIP_LAUNCHER", "EXTRA")}))
    """
    assert run_ranks(ranks_of(body, tmp_path), 3, env={"EXTRA": "yes"}) == 0
    texts = [(tmp_path / f"{rank}.json").read_text() for rank in range(3)]
    assert all('"WORLD_SIZE": "3"' in text and '"EXTRA": "yes"' in text and '"--procs"' in text for text in texts)
    assert f'"LOCAL_RANK": "{2}"' in texts[2]


def test_a_signal_reaches_every_rank_once(tmp_path: Path) -> None:
    """However often, and of however many kinds, it comes to the launcher."""
    body = """
    listen()
    (folder / f"ready{rank}").touch()
    wait()
    wait(30, (folder / "sent").exists)
    time.sleep(0.3)
    (folder / f"heard{rank}").write_text(" ".join(heard))
    sys.exit(75)
    """
    sender = signal_when(tmp_path / "ready1", signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
    assert run_ranks(ranks_of(body, tmp_path), 2, listens=True) == 75
    sender.join()
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2


def test_a_signal_before_a_rank_listens_is_kept_for_it(tmp_path: Path) -> None:
    body = """
    (folder / "started").touch()
    time.sleep(1.0)
    listen()
    wait(5)
    sys.exit(75 if heard == ["SIGUSR1"] else 1)
    """
    sender = signal_when(tmp_path / "started", signal.SIGUSR1)
    assert run_ranks(ranks_of(body, tmp_path), 1, listens=True) == 75
    sender.join()


def test_without_listening_a_signal_ends_the_ranks(tmp_path: Path) -> None:
    """The twin: nothing is kept for a program that never asks for it."""
    sender = signal_when(tmp_path / "started", signal.SIGTERM)
    assert run_ranks(ranks_of('(folder / "started").touch()\ntime.sleep(30)', tmp_path), 1) == 128 + signal.SIGTERM
    sender.join()


@pytest.mark.slow
def test_one_failure_ends_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        print("out of luck")
        sys.exit(7)
    time.sleep(60)
    """
    begun = time.monotonic()
    assert run_ranks(ranks_of(body, tmp_path), 2) == 7
    assert time.monotonic() - begun < 30
    reported = capfd.readouterr().err
    assert "rank 1 failed first (exit 7)" in reported and "out of luck" in reported


def test_a_rank_that_saved_and_left_does_not_hurry_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amclip_ds.launch.GRACE_S", 0.3)
    monkeypatch.setattr("amclip_ds.launch.GRACE_WHEN_STOPPING_S", 0.3)
    body = """
    if rank == 0:
        time.sleep(2)
        (folder / "saved").touch()
    sys.exit(75)
    """
    assert run_ranks(ranks_of(body, tmp_path), 2) == 75 and (tmp_path / "saved").exists()


def test_ranks_that_never_leave_are_ended_by_the_timer(tmp_path: Path) -> None:
    sender = signal_when(tmp_path / "started", signal.SIGUSR1)
    begun = time.monotonic()
    body = 'listen()\n(folder / "started").touch()\nwait(60, lambda: False)'
    assert run_ranks(ranks_of(body, tmp_path), 2, forced_exit_s=1.0, listens=True) == 128 + signal.SIGKILL
    sender.join()
    assert 1.0 < time.monotonic() - begun < 30


def test_the_verdict_counts_unless_it_is_an_older_one(tmp_path: Path) -> None:
    verdict = tmp_path / "exit.json"
    writing = 'if rank == 0: (folder / "exit.json").write_text(json.dumps({"code": 3}))\nsys.exit(1)'
    assert run_ranks(ranks_of(writing, tmp_path), 2, tmp_path) == 3
    assert run_ranks(ranks_of("sys.exit(9)", tmp_path), 2, tmp_path) == 9, "left by the run before"
    writing = (
        'if rank == 0: (folder / "exit.json").write_text(json.dumps({"code": 0, "whose": "another"}))\nsys.exit(3)'
    )
    assert run_ranks(ranks_of(writing, tmp_path), 2, tmp_path) == 3, "all ranks lost the folder: not their verdict"
    assert verdict.exists()


def test_ranks_die_with_their_launcher(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    body = '(folder / f"pid{rank}").write_text(str(os.getpid()))\ntime.sleep(600)'
    code = f"from amclip_ds.launch import run_ranks; run_ranks({ranks_of(body, tmp_path)!r}, 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


FORKS = """
from amclip_ds.launch import hold_signals_back, train_ranks
hold_signals_back()
def ahead():
    (folder / "pids").write_text(str(os.getpid()))
    {ahead}
code = train_ranks([], 2, folder, forced_exit_s=60, max_restarts={restarts}, import_ahead=ahead)
if code is not None:
    assert not [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("amclip-")]
    sys.exit(code)
rank = int(os.environ["RANK"])
attempt = len(list(folder.glob(f"begun{{rank}}-*")))
(folder / f"begun{{rank}}-{{attempt}}").write_text(str(os.getpid()))
"""


def forks(folder: Path, body: str, ahead: str = "", restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """A launcher whose two ranks are its forks and run `body`; `ahead` runs before there are any."""
    head = HEAD.replace('int(os.environ["RANK"])', "None") + FORKS.format(ahead=ahead or "pass", restarts=restarts)
    (folder / "tmp").mkdir()
    return subprocess.run(
        [sys.executable, "-S", "-c", head + textwrap.dedent(body), str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_forks_are_ranks_of_their_own_and_hear_what_came_before_them(tmp_path: Path) -> None:
    """A signal that arrives while the launcher imports for them stops them as any other does."""
    body = """
    assert os.environ["WORLD_SIZE"] == "2" and os.getpgrp() == os.getpid()
    print("spoken by rank", rank)
    listen()
    wait()
    time.sleep(0.3)
    (folder / f"heard{rank}").write_text(" ".join(heard))
    sys.exit(75)
    """
    done = forks(tmp_path, body, ahead="os.kill(os.getpid(), signal.SIGTERM)")
    assert done.returncode == 75, done.stderr
    assert [(tmp_path / f"heard{rank}").read_text() for rank in (0, 1)] == ["SIGTERM"] * 2
    assert done.stdout == "spoken by rank 0\n"
    launcher = (tmp_path / "pids").read_text()
    assert len({launcher, *((tmp_path / f"begun{rank}-0").read_text() for rank in (0, 1))}) == 3


LOST = """
if rank == 1 and attempt < 2:
    wait(30, (folder / f"begun0-{attempt}").exists)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0 if attempt == 2 else 60)
"""


def test_lost_ranks_are_started_again(tmp_path: Path) -> None:
    """All of them, as often as was allowed; what the launcher imports is imported once."""
    done = forks(tmp_path, LOST, ahead="import amclip_ds.launch as l; l.GRACE_S = 0.1", restarts=2)
    assert done.returncode == 0 and "restart 2 of 2" in done.stderr, done.stderr
    assert len(list(tmp_path.glob("begun*"))) == 6


def test_programs_that_are_lost_are_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, where ranks are no forks."""
    monkeypatch.setattr("amclip_ds.launch.GRACE_S", 0.1)
    begun = """
    attempt = len(list(folder.glob(f"begun{rank}-*")))
    (folder / f"begun{rank}-{attempt}").touch()
    """
    argv = ranks_of(textwrap.dedent(begun) + LOST, tmp_path)
    assert train_ranks(argv, 2, tmp_path, forced_exit_s=60, max_restarts=2) == 0
    assert len(list(tmp_path.glob("begun*"))) == 6


def test_lost_ranks_are_not_started_again_more_often_than_asked(tmp_path: Path) -> None:
    done = forks(tmp_path, LOST, ahead="import amclip_ds.launch as l; l.GRACE_S = 0.1", restarts=1)
    assert done.returncode == 128 + signal.SIGKILL and len(list(tmp_path.glob("begun*"))) == 4, done.stderr


@pytest.mark.parametrize(
    "ending", ['(folder / "exit.json").write_text(json.dumps({"code": 1})); sys.exit(1)', "sys.exit(2)"]
)
def test_what_ended_with_a_verdict_is_not_started_again(ending: str, tmp_path: Path) -> None:
    assert forks(tmp_path, ending, restarts=5).returncode in (1, 2)
    assert len(list(tmp_path.glob("begun*"))) == 2


@pytest.mark.parametrize("words", ["", "--procs 2 --resume never"])
def test_restarts_that_nobody_would_make_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "aclip-tiny", "--max-restarts", "3", *words.split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("amclip train: --max-restarts: ")
