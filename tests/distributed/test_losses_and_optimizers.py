"""Every choice of optimizer and contrastive loss on real engines: sharded on two ranks as on one rank unsharded."""

from functools import cache
from typing import Any

import pytest

from tests.harness import RankFailed, run_ranks

CASE = "tests.distributed.cases:train_all"
ONE_RANK = ("zero0_fp32.json", 1)
WHOLE_TENSOR = ("lamb", "adafactor", "muon")
# SGD amplifies nothing; lion steps by signs, where one rounding of a zero gradient is a whole step.
CHOICES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": {"kind": "sigmoid", "chunk": 2}},
    "chunked": {"loss": {"chunk": 1}},
    "layer_decay": {"optim": {"layer_decay": 0.7, "text_lr_scale": 0.5}},
    "lion": {"optim": {"name": "lion", "lr": 1e-3}},
}
UNCHUNKED: dict[str, dict[str, Any]] = CHOICES | {"sigmoid": {"loss": {"kind": "sigmoid"}}, "chunked": {}}
TOLERANCE = {"sigmoid": 1e-5, "chunked": 1e-5, "layer_decay": 1e-5, "lion": 1e-4}


@cache
def losses(ds: str, world_size: int) -> dict[str, list[float]]:
    """Choice -> losses of some steps, all from one launch; one rank, the reference, has some more of them."""
    choices = CHOICES
    if (ds, world_size) == ONE_RANK:
        choices = UNCHUNKED | {name: {"optim": {"name": name, "lr": 1e-3}} for name in WHOLE_TENSOR}
    results = run_ranks(CASE, world_size=world_size, timeout_s=600, ds=ds, variants=list(choices.values()))
    return {name: result["losses"] for name, result in zip(choices, results[0], strict=True)}


@pytest.mark.parametrize("ds", [pytest.param("zero2_fp32.json", marks=pytest.mark.nightly), "zero3_fp32.json"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_two_sharded_ranks_as_one(ds: str, name: str) -> None:
    assert losses(ds, 2)[name] == pytest.approx(losses(*ONE_RANK)[name], rel=TOLERANCE[name])


def test_each_choice_is_another_run() -> None:
    """The twin: a setting that reached nothing would agree with the default."""
    plain = losses(*ONE_RANK)["chunked"]  # which is the default there
    for name in ("layer_decay", "sigmoid", "lion"):
        assert losses(*ONE_RANK)[name] != pytest.approx(plain, rel=1e-3), name


@pytest.mark.parametrize("name", WHOLE_TENSOR)
def test_whole_tensor_optimizers_run_at_stage_0(name: str) -> None:
    values = losses(*ONE_RANK)[name]
    assert values[-1] < values[0]


def test_whole_tensor_optimizers_are_refused_where_tensors_are_cut() -> None:
    with pytest.raises(RankFailed, match=r"optim\.name: muon looks at whole tensors"):
        run_ranks(CASE, world_size=2, timeout_s=300, ds="zero2_fp32.json", variants=[{"optim": {"name": "muon"}}])
