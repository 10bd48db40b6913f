"""Signs of life of a rank; and the watching process is itself watched: killed, it comes back, and that is recorded."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amclip_ds.engine.compile import reported
from amclip_ds.jsonl import read_lines
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.record import LogConfig, Record
from amclip_ds.resilience import watch_ranks, watchdog
from amclip_ds.resilience.config import WatchdogConfig
from amclip_ds.resilience.watch_ranks import process_state
from amclip_ds.resilience.watchdog import Watchdog


def alone() -> Runtime:
    return Runtime(0, 1, 0, 1, 1, 0, torch.device("cpu"), launcher="none", is_main=True)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watchdog]:
    with Watchdog(WatchdogConfig(step_timeout_s=60.0), tmp_path, 0, alone()) as dog:
        yield dog


def wait_for_another(dog: Watchdog, pid: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert dog._process is not None
        if dog._process.pid != pid and process_state(dog._process.pid, 0):
            return dog._process.pid
        time.sleep(0.02)
    raise AssertionError("it did not come back")


def test_a_killed_watch_comes_back_and_is_recorded(watched: Watchdog, tmp_path: Path) -> None:
    assert watched._process is not None
    first = watched._process.pid
    for _ in range(2):
        os.kill(first, signal.SIGKILL)
        first = wait_for_another(watched, first)
    with Record(
        tmp_path, LogConfig(tensorboard=False), rank=0, world_size=1, attempt=0, total_steps=5, samples_per_epoch=10
    ) as record:
        watched.report_slow_ranks(record)
        watched.report_slow_ranks(record)
    rows = read_lines(tmp_path / "incidents.jsonl")
    assert [(row["kind"], row["action"]) for row in rows] == [("watchdog", "started again")] * 2
    assert "status -9" in rows[0]["cause"]


def test_a_watch_that_cannot_live_is_given_up_aloud(
    watched: Watchdog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (watched._place / "settings.json").unlink()
    assert watched._process is not None
    os.kill(watched._process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not watched._ended and time.monotonic() < deadline:
        time.sleep(0.02)
    assert watched._ended[0][1] == "no hang is noticed any more"
    assert "no hang is noticed any more" in capfd.readouterr().err


def test_an_orderly_end_is_no_incident(tmp_path: Path) -> None:
    with Watchdog(WatchdogConfig(step_timeout_s=1.0), tmp_path, 0, alone()) as dog:
        settings = json.loads((dog._place / "settings.json").read_text())
    assert settings["ranks"] == [0] and not dog._ended and watchdog.RESTARTS > 0


def beat_of(dog: Watchdog) -> tuple[str, int, float]:
    """The sign of life as the watching process reads it: phase, step, limit."""
    beat = watch_ranks.read_beat(dog._place / "rank0.beat")
    assert beat is not None
    return beat["phase"], beat["step"], beat["limit_s"]


def test_a_later_step_that_compiles_has_its_time(watched: Watchdog) -> None:
    """And is no measure of the rank's own speed; a step that compiles nothing is one."""
    during, measured = [], []

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        during.append(beat_of(watched))
        return graph.forward

    torch._dynamo.reset()
    doubled = torch.compile(lambda x: x * 2, backend=backend, dynamic=False)
    batches: Any = iter([3, 3, 4, 4])
    with reported(watched.compile_begins, watched.compile_ends):
        for length in watched.watched(batches, step=7):
            doubled(torch.ones(length))
            assert beat_of(watched)[0] == "step"
            watched.arrived()
            measured.append(watched._own._steps)
        assert beat_of(watched) == ("data", 11, 60.0)
    assert during == [("compile", 7, 3600.0), ("compile", 9, 3600.0)]
    assert measured == [0, 1, 1, 2]
