"""Every choice of optimizer and contrastive loss on real engines: sharded on two ranks as on one rank unsharded."""

from functools import cache
from typing import Any

import pytest

from tests.harness import RankFailed, run_ranks

ONE_RANK = ("zero0_fp32.json", 1)


@cache
def losses(ds: str, world_size: int, **settings: Any) -> list[float]:
    optim = {key.removeprefix("optim_"): value for key, value in settings.items() if key.startswith("optim_")}
    loss = {key.removeprefix("loss_"): value for key, value in settings.items() if key.startswith("loss_")}
    results = run_ranks(
        "tests.distributed.cases:train", world_size=world_size, timeout_s=300, ds=ds, optim=optim, loss=loss
    )
    return results[0]["losses"]


# SGD amplifies nothing; lion steps by signs, where one rounding of a zero gradient is a whole step.
@pytest.mark.parametrize("ds", [pytest.param("zero2_fp32.json", marks=pytest.mark.nightly), "zero3_fp32.json"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"loss_kind": "sigmoid", "loss_chunk": 2}, 1e-5),
        ({"loss_chunk": 1}, 1e-5),
        ({"optim_layer_decay": 0.7, "optim_text_lr_scale": 0.5}, 1e-5),
        ({"optim_name": "lion", "optim_lr": 1e-3}, 1e-4),
    ],
    ids=["sigmoid", "chunked", "layer_decay", "lion"],
)
def test_two_sharded_ranks_as_one(ds: str, settings: dict[str, Any], tolerance: float) -> None:
    unchunked = {key: value for key, value in settings.items() if key != "loss_chunk"}
    expected = losses(*ONE_RANK, **unchunked)
    assert losses(ds, 2, **settings) == pytest.approx(expected, rel=tolerance)


def test_each_choice_is_another_run() -> None:
    """The twin: a setting that reached nothing would agree with the default."""
    plain = losses(*ONE_RANK)
    assert losses(*ONE_RANK, optim_layer_decay=0.7, optim_text_lr_scale=0.5) != pytest.approx(plain, rel=1e-3)
    assert losses(*ONE_RANK, loss_kind="sigmoid") != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ["lamb", "adafactor", "muon"])
def test_whole_tensor_optimizers_run_at_stage_0(name: str) -> None:
    values = losses(*ONE_RANK, optim_name=name, optim_lr=1e-3)
    assert values[-1] < values[0]


def test_whole_tensor_optimizers_are_refused_where_tensors_are_cut() -> None:
    with pytest.raises(RankFailed, match=r"optim\.name: muon looks at whole tensors"):
        losses("zero2_fp32.json", 2, optim_name="muon")
