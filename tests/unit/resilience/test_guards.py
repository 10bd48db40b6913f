"""Guards on one rank: what is a spike, what each policy does with it, and the state that a checkpoint keeps.

The agreement between ranks is tested on real engines (tests/distributed/test_guards.py).
"""

import json
import math
from typing import Any

import pytest
import torch

from amclip_ds.errors import RunStopped
from amclip_ds.model.features import Losses
from amclip_ds.resilience.guards import Guards, GuardsConfig, RewindAsked, finite_rows

IDS = torch.tensor([5, 6, 7])


def losses_of(loss: float, bad_rows: tuple[int, ...] = ()) -> Losses:
    cls, eot = torch.ones(2, 3, 4), torch.ones(3, 4)
    for row in bad_rows:
        cls[1, row, 2] = math.inf
    return Losses(torch.tensor(loss), {}, cls, {"plain": eot}, torch.ones(1))


def test_a_text_that_is_not_finite_is_found_as_an_image_is() -> None:
    found = losses_of(math.nan)
    found.eot["plain"][2, 1] = math.nan
    assert finite_rows(found).tolist() == [True, True, False] and finite_rows(losses_of(1.0)).all()


def admits(guards: Guards, losses: Losses) -> bool:
    """Whether the gradient is left as it is; the host's answer is the device's."""
    factor = float(guards.admit(losses))
    assert guards.admitted == (factor == 1.0) == (not math.isnan(factor))
    return guards.admitted


def feed(guards: Guards, losses: list[float], first_step: int = 1) -> list[bool]:
    """Steps whose gradients are sound; returns which were applied."""
    applied = []
    for step, loss in enumerate(losses, start=first_step):
        applied.append(admits(guards, losses_of(loss)))
        guards.account(step, applied[-1], IDS)
    return applied


def guards_with(reported: list[Any], **settings: Any) -> Guards:
    config = GuardsConfig(**({"spike_window": 10} | settings))
    return Guards(config, lambda kind, cause, **more: reported.append((kind, cause, more)))


RIPPLES = [5.0 + 0.02 * (-1) ** n for n in range(10)]


def test_a_loss_that_is_not_finite_is_refused_and_its_samples_named() -> None:
    reported: list[Any] = []
    guards = guards_with(reported, max_skipped=2)
    for loss, bad in ((math.nan, (0, 2)), (1.0, (1,))):  # a finite loss over a bad sample is refused as well
        assert admits(guards, losses_of(loss)) == math.isfinite(loss)
        assert not admits(guards, losses_of(loss, bad))
    guards.admit(losses_of(math.nan, (0, 2)))
    guards.account(11, False, IDS)
    assert reported == [
        ("non_finite_loss", "step 11: non-finite loss, from rank 0", {"key": "5,7", "action": "skipped on all ranks"})
    ]
    assert feed(guards, [1.0]) == [True] and guards.skipped_in_a_row == 0 and guards.skipped == 1
    guards.admit(losses_of(math.nan, (1,)))
    guards.account(13, False, IDS)
    guards.admit(losses_of(math.nan, (1,)))
    with pytest.raises(RunStopped, match="2 steps in a row.*step 14.*rank 0: 6;") as caught:
        guards.account(14, False, IDS)
    assert caught.value.exit_code == 3 and guards.window == [1.0]


def test_a_gradient_that_is_not_finite_counts_like_a_loss() -> None:
    reported: list[Any] = []
    guards = guards_with(reported, max_skipped=1)
    assert admits(guards, losses_of(1.0))
    with pytest.raises(RunStopped, match="non-finite gradient"):
        guards.account(1, False, IDS)
    assert reported[0][0] == "non_finite_gradient" and reported[0][2]["key"] == "5,6,7"


def test_no_spike_before_the_window_is_full_nor_downwards() -> None:
    reported: list[Any] = []
    guards = guards_with(reported, spike="skip")
    assert all(feed(guards, [5.0, 90.0, 5.0]))
    assert all(feed(guards_with(reported, spike="skip"), [*RIPPLES, 1.0, 5.1]))
    assert not reported


def test_log_records_and_continues() -> None:
    reported: list[Any] = []
    guards = guards_with(reported)
    assert all(feed(guards, [*RIPPLES, 6.0]))
    assert [row[0] for row in reported] == ["loss_spike"] and "leapt over" in reported[0][1]
    assert guards.window[-1] == 6.0


def test_skip_leaves_the_step_out_of_the_window_and_stops_at_last() -> None:
    reported: list[Any] = []
    guards = guards_with(reported, spike="skip", max_skipped=3)
    assert feed(guards, [*RIPPLES, 6.0, 5.0]) == [True] * 10 + [False, True]
    assert 6.0 not in guards.window and guards.skipped == 1
    with pytest.raises(RunStopped, match="3 steps in a row were skipped"):
        feed(guards, [6.0] * 3)


def test_rewind_asks_for_the_last_checkpoint_but_not_for_ever() -> None:
    guards = guards_with([], spike="rewind", max_rewinds=1)
    feed(guards, RIPPLES)
    saved = guards.state_dict()
    with pytest.raises(RewindAsked, match="step 11") as caught:
        feed(guards, [6.0], first_step=11)
    assert caught.value.step == 11 and caught.value.exit_code == 3
    guards.load_state_dict(saved)  # the checkpoint's, from before the spike
    assert guards.rewinds == 1 and guards.window == saved["window"]
    with pytest.raises(RunStopped, match="after 1 rewinds") as stopped:
        feed(guards, [6.0], first_step=11)
    assert not isinstance(stopped.value, RewindAsked)


def test_the_state_is_plain_and_decides_the_same() -> None:
    guards = guards_with([], spike="skip")
    feed(guards, [4.0, *RIPPLES])
    state = json.loads(json.dumps(guards.state_dict()))
    other = guards_with([], spike="skip")
    other.load_state_dict(state)
    assert other.state_dict() == guards.state_dict() and len(other.window) == 10
    assert feed(other, [5.05, 6.0]) == feed(guards, [5.05, 6.0]) == [True, False]
    fresh = guards_with([], spike="skip")  # the twin: without the state the spike is taken for a beginning
    assert feed(fresh, [5.05, 6.0]) == [True, True]


@pytest.mark.parametrize(
    "changes",
    [{"spike": "ignore"}, {"max_skipped": 0}, {"spike_window": 1}, {"spike_deviations": 0.0}, {"max_rewinds": -1}],
    ids=str,
)
def test_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"guards\.{next(iter(changes))}"):
        GuardsConfig(**changes)
