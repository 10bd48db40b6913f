"""Many trainers start at once in a folder that somebody left: one owns it, also where the file system is slow."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.resilience import ownership
from tests.unit.resilience import claimants

LONG_AGO_S = 3600.0
LEFT = {
    "elsewhere, its heartbeat has stopped": {"machine": "elsewhere"},
    "here, its process is gone": {"machine": ownership._machine(), "pid": 1 << 22, "started": 1},
    "released": {"machine": "elsewhere", "released": True},
    "the same job, started again": {"machine": "elsewhere", "job": "7", "restart": 0},
    "killed before its first heartbeat": None,
}


def leave(folder: Path, facts: dict[str, Any] | None) -> None:
    """A folder as its last owner left it an hour ago."""
    folder.mkdir()
    files = {".owner-000004": "somebody's"}
    if facts is not None:
        owner = {"claim": 4, "host": "node7", "heartbeat": time.time() - LONG_AGO_S, "job": "", "restart": 0} | facts
        files["owner.json"] = json.dumps(owner)
    for name, text in files.items():
        (folder / name).write_text(text)
        os.utime(folder / name, (time.time() - LONG_AGO_S,) * 2)


@contextmanager
def processes(count: int, slow_s: float) -> Iterator[list[subprocess.Popen]]:
    command = [sys.executable, claimants.__file__, str(slow_s)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.communicate(timeout=60)


def ask(group: list[subprocess.Popen], task: dict[str, Any]) -> list[dict[str, Any]]:
    for process in group:
        assert process.stdin is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in group if process.stdout is not None]


def race(root: Path, rounds: int, slow_s: float) -> list[tuple[int, str, int, int]]:
    """(claimants, what was left, owners when each had its answer, owners when all had) of each round."""
    found, dice = [], random.Random(rounds)
    with processes(8, slow_s) as started:
        for number in range(rounds):
            folder, (left, facts) = root / str(number), list(LEFT.items())[number % len(LEFT)]
            leave(folder, facts)
            group = dice.sample(started, dice.randint(2, 8))
            task = {"folder": str(folder), "at": time.monotonic() + 0.01, "job": "7", "restart": 1}
            first = ask(group, task)
            found.append((len(group), left, sum(a["owns"] for a in first), sum(a["owns"] for a in ask(group, {}))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "slow_s"),
    [
        (30, 0.0),
        (15, 0.01),
        pytest.param(2000, 0.0, marks=pytest.mark.nightly),
        pytest.param(2000, 0.02, marks=pytest.mark.nightly),
    ],
)
def test_of_those_that_start_at_once_one_owns(tmp_path: Path, rounds: int, slow_s: float) -> None:
    found = race(tmp_path, rounds, slow_s)
    assert len(found) == rounds and not [row for row in found if row[2:] != (1, 1)]
