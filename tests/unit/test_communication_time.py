"""The clock of the collectives on a GPU, with events that stand in for its own: who waits for the device, and when."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from amclip_ds import meter
from amclip_ds.ranks import communication_time
from amclip_ds.ranks.communication_time import CommunicationTime
from amclip_ds.train import account


class Device:
    """Counts the events that the host waited for; each pair is 250 ms apart. Each pair has a stream of its own."""

    def __init__(self) -> None:
        self.waits = 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self.is_done = device, False

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self._device.waits += 1
        self.is_done = True

    def elapsed_time(self, last: "Event") -> float:
        if not last.is_done:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 250.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    return device


def test_what_is_done_in_a_pause_is_left_out_and_nothing_is_waited_for(device: Device) -> None:
    clock = CommunicationTime()
    with clock.waiting():
        pass
    with clock.paused(), clock.waiting():
        pass
    with clock.waiting():
        pass
    assert device.waits == 0
    assert clock.take() == 0.5 and device.waits == 2
    assert clock.take() == 0.0 and device.waits == 2


def test_a_step_that_is_not_logged_waits_for_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CommunicationTime()
    monkeypatch.setattr(meter, "COMMUNICATION", clock)
    monkeypatch.setattr(meter, "matrix_rate", lambda device, dtype: 1.0)
    runtime: Any = SimpleNamespace(device=torch.device("cpu"), local_world_size=1)
    student: Any = SimpleNamespace(module=SimpleNamespace(text=None), dtype=torch.float32)
    run = MagicMock()
    run.meter = meter.Meter(8, runtime, 1, None, student)
    run.timeline.first_step.return_value = None
    run.config.run.log_sample_ids = run.runtime.is_main = False
    run.record.is_due.return_value = False
    for _ in range(5):
        with clock.waiting():  # as the teacher's all-gather, the last of a step
            pass
        account(run, MagicMock(), MagicMock())
    assert run.profile.step.call_count == 5 and device.waits == 0
    assert clock.take() == 5 * 0.25


def test_many_collectives_are_added_up_on_the_way(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communication_time, "MOST_EVENTS", 3)
    clock = CommunicationTime()
    for _ in range(4):
        with clock.waiting():
            pass
    assert device.waits == 4 and clock.take() == 1.0
