"""One trainer per folder: refused, waited for, taken over; whoever lost it knows before the next commit."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from amclip_ds.errors import UserError
from amclip_ds.resilience import ownership
from amclip_ds.resilience.ownership import OwnershipConfig, OwnershipLost, claim, read_owner

QUICK = OwnershipConfig(heartbeat_s=0.1, stale_s=10.0)
IMPATIENT = OwnershipConfig(heartbeat_s=0.1, stale_s=1.0)


def quiet(_: str) -> None:
    """Says nothing."""


def another_trainer(folder: Path, **facts: object) -> None:
    """Makes owner.json another machine's: nothing can be concluded from its process number here."""
    owner = read_owner(folder) or {}
    (folder / "owner.json").write_text(json.dumps(owner | {"machine": "elsewhere", "host": "node7"} | facts))


def test_owner_json_shows_who(tmp_path: Path) -> None:
    owner = claim(tmp_path / "run", QUICK, job="42", say=quiet)
    owner.set_attempt(3)
    reported = read_owner(tmp_path / "run")
    assert reported is not None
    assert (reported["job"], reported["attempt"], reported["pid"]) == ("42", 3, os.getpid())
    first = reported["heartbeat"]
    deadline = time.monotonic() + 20
    while (read_owner(tmp_path / "run") or {})["heartbeat"] == first:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    owner.release()


def test_a_second_trainer_is_refused_and_the_owner_named(tmp_path: Path) -> None:
    owner = claim(tmp_path, QUICK, job="42", say=quiet)
    with pytest.raises(UserError, match=rf"run\.out: .* is being trained by job 42, .* process {os.getpid()} on"):
        claim(tmp_path, QUICK, say=quiet)
    owner.check()
    owner.release()


def test_a_released_folder_is_free_at_once(tmp_path: Path) -> None:
    claim(tmp_path, OwnershipConfig(stale_s=60), say=quiet).release()
    begun = time.monotonic()
    claim(tmp_path, OwnershipConfig(stale_s=60), say=quiet).release()
    assert time.monotonic() - begun < 30


def test_a_dead_process_of_this_machine_is_no_owner(tmp_path: Path) -> None:
    script = (
        "import os; from pathlib import Path; from amclip_ds.resilience.ownership import *;"
        f"claim(Path({str(tmp_path)!r}), OwnershipConfig()); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", script], timeout=120)
    assert read_owner(tmp_path) is not None
    begun = time.monotonic()
    claim(tmp_path, OwnershipConfig(), say=quiet).release()
    assert time.monotonic() - begun < 30


def test_a_standing_heartbeat_is_waited_out_then_taken_over(tmp_path: Path) -> None:
    owner = claim(tmp_path, QUICK, say=quiet)
    owner._over.set()  # the owner is stopped: its heart has stopped
    owner._thread.join()
    another_trainer(tmp_path)
    said: list[str] = []
    begun = time.monotonic()
    second = claim(tmp_path, IMPATIENT, say=said.append)
    assert 0.5 < time.monotonic() - begun < 20
    assert any("node7" in line and "taken over" in line for line in said)
    with pytest.raises(OwnershipLost):
        owner.check()
    second.check()
    second.release()
    with pytest.raises(OwnershipLost):  # also after the successor has left
        owner.check()


def test_a_beating_owner_elsewhere_is_seen_though_its_clock_is_wrong(tmp_path: Path) -> None:
    claim(tmp_path, QUICK, say=quiet).release()
    over = threading.Event()

    def beat() -> None:
        number = 0.0
        while not over.wait(0.1):
            number += 1
            another_trainer(tmp_path, released=False, heartbeat=number)  # 1970

    another_trainer(tmp_path, released=False, heartbeat=0.0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="node7"):
            claim(tmp_path, QUICK, say=quiet)
    finally:
        over.set()
        thread.join()


def test_the_same_slurm_job_started_again_takes_over_at_once(tmp_path: Path) -> None:
    old = claim(tmp_path, QUICK, job="42", restart=0, say=quiet)
    begun = time.monotonic()
    new = claim(tmp_path, QUICK, job="42", restart=1, say=quiet)
    assert time.monotonic() - begun < 5
    deadline = time.monotonic() + 20
    while not old.is_lost() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert old.is_lost() and not new.is_lost()
    old.release()  # leaves the new owner's files alone
    new.check()
    with pytest.raises(UserError, match="job 42"):  # another step of the same start is a second trainer
        claim(tmp_path, QUICK, job="42", restart=1, say=quiet)
    new.release()


def test_of_many_that_start_at_once_one_owns(tmp_path: Path) -> None:
    owners, refused = [], []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        try:
            owners.append(claim(tmp_path, QUICK, say=quiet))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holding = [owner for owner in owners if owner.claim.holds()]
    assert len(holding) == 1 and len(owners) + len(refused) == 8
    for owner in owners:
        owner.release()


def test_a_folder_that_vanished_is_not_anothers(tmp_path: Path) -> None:
    owner = claim(tmp_path / "run", QUICK, say=quiet)
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    owner.check()  # the next write will report it
    ownership._create(tmp_path / "run", 5)
    with pytest.raises(OwnershipLost):
        owner.check()
    owner.release()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.out: .*file/run cannot be written"):
        claim(tmp_path / "file" / "run", QUICK, say=quiet)
