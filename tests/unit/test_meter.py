"""MFU: what a step does is held against a rate that the device can do. The clock begins with the first batch; peaks of
memory are of one training."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amclip_ds import meter
from amclip_ds.step import StepResult


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One rank."""
    monkeypatch.setattr(meter, "mean_over_ranks", lambda local, device: dict(local))
    monkeypatch.setattr(meter, "max_over_ranks", lambda value, device: value)
    return SimpleNamespace(device=torch.device("cpu"), local_world_size=1)


RESULT: Any = SimpleNamespace(**dict.fromkeys(StepResult.__dataclass_fields__, 0.0) | {"parts": {}})


def test_what_comes_before_the_first_batch_is_no_steps_time(runtime: Any) -> None:
    """As a checkpoint that is loaded between the engines and the first step."""
    student: Any = SimpleNamespace(
        module=SimpleNamespace(text=SimpleNamespace(groups=lambda lengths, longest: ())), dtype=torch.float32
    )
    run = meter.Meter(8, runtime, 1, None, student)
    batch: Any = SimpleNamespace(token_ids=torch.zeros(8, 4), text_lengths={})
    batches = run.timed(iter([batch, batch]))
    time.sleep(0.3)
    for _ in range(2):
        next(batches)
    assert run.row(RESULT)["step_s"] < 0.1


def test_a_step_faster_than_the_measured_rate_has_it_measured_again(
    runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where other processes had the cores when the run began: it was shown as an MFU of 170%."""
    measured = iter([1e9, 8e9, 1e9])
    monkeypatch.setattr(meter, "matrix_rate", lambda device, dtype: next(measured))
    monkeypatch.setattr(meter, "mean_over_ranks", lambda local, device: local | {"step_s": 1.0})
    student: Any = SimpleNamespace(module=SimpleNamespace(text=None), dtype=torch.float32)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: 1.0)
    flops = [0.0]
    run = meter.Meter(8, runtime, 1, lambda kept, tokens, progress: flops[0], student)
    found = []
    for done in (5e8, 4e9, 4e9, 16e9):
        run._steps, run._began, flops[0] = 1, 0.0, done
        found.append(run.row(RESULT)["mfu"])
    assert found == [0.5, 0.5, 0.5, 1.0] and next(measured, None) is None


PEAKS = """
import torch
from amclip_ds.engine.memory import begin_peak, peak_bytes
from amclip_ds.ranks.runtime import keep_freed_memory

device = torch.device("cpu")
keep_freed_memory()
begin_peak(device)
begun = peak_bytes(device)
for count in (3 << 26, 1 << 26):
    torch.ones(count)
    print((peak_bytes(device) - begun) / (4 * count))
    begin_peak(device)
"""


def test_the_peak_of_an_earlier_training_is_none_of_the_next_ones() -> None:
    """In a process that keeps what it frees, as one that trains on a CPU does."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    assert [float(share) for share in done.stdout.split()] == [pytest.approx(1.0, abs=0.1)] * 2
