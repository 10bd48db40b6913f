"""Every choice of optimizer and contrastive loss on real engines: sharded on two ranks as on one rank unsharded."""

from functools import cache
from typing import Any

import pytest

from tests.harness import run_ranks

CASE = "tests.distributed.cases:train_all"
ONE_RANK = ("zero0_fp32.json", 1)
# SGD amplifies nothing; lion steps by signs, where one rounding of a zero gradient is a whole step.
CHOICES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": {"kind": "sigmoid", "chunk": 2}},
    "chunked": {"loss": {"chunk": 1}},
    "layer_decay": {"optim": {"layer_decay": 0.7, "text_lr_scale": 0.5}},
    "lion": {"optim": {"name": "lion", "lr": 1e-3}},
    "muon": {"optim": {"name": "muon", "lr": 2e-3, "momentum": 0.95, "weight_decay": 0.05}},
    "muon in pieces": {
        "optim": {"name": "muon", "lr": 2e-3, "momentum": 0.95, "weight_decay": 0.05},
        "accumulation": 2,
    },
}
UNCHUNKED: dict[str, dict[str, Any]] = CHOICES | {"sigmoid": {"loss": {"kind": "sigmoid"}}, "chunked": {}}
TOLERANCE = {"sigmoid": 1e-5, "chunked": 1e-5, "layer_decay": 1e-5, "lion": 1e-4, "muon": 1e-4, "muon in pieces": 1e-4}


@cache
def results(ds: str, world_size: int) -> dict[str, dict[str, Any]]:
    """Choice -> losses and gradient norms of some steps, all from one launch; one rank is the reference."""
    choices = UNCHUNKED if (ds, world_size) == ONE_RANK else CHOICES
    found = run_ranks(CASE, world_size=world_size, timeout_s=600, ds=ds, variants=list(choices.values()))
    return dict(zip(choices, found[0], strict=True))


@pytest.mark.parametrize(
    "ds", [*(pytest.param(f"zero{stage}_fp32.json", marks=pytest.mark.nightly) for stage in (1, 2)), "zero3_fp32.json"]
)
@pytest.mark.parametrize("name", TOLERANCE)
def test_two_sharded_ranks_as_one(ds: str, name: str) -> None:
    for what in ("losses", "norms"):
        expected = results(*ONE_RANK)[name][what]
        assert results(ds, 2)[name][what] == pytest.approx(expected, rel=TOLERANCE[name]), what


@pytest.mark.nightly
def test_muon_moves_every_matrix_of_the_blocks_at_a_border() -> None:
    """Stage 2 on 4 ranks: matrices lie on two of them, and each orthogonalises them whole."""
    muon = CHOICES["muon"] | {"batch_size": 8}
    one = run_ranks(CASE, world_size=1, timeout_s=600, ds="zero0_fp32.json", variants=[muon])[0][0]
    four = run_ranks(CASE, world_size=4, timeout_s=600, ds="zero2_fp32.json", variants=[muon])[0][0]
    assert four["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, weight in one["student"].items():
        if ".blocks." in name and weight.dim() == 2:
            assert float((four["student"][name] - weight).abs().max()) < 1e-4, name


def test_each_choice_is_another_run() -> None:
    """The twin: a setting that reached nothing would agree with the default."""
    plain = results(*ONE_RANK)["chunked"]["losses"]  # which is the default there
    for name in ("layer_decay", "sigmoid", "lion", "muon"):
        assert results(*ONE_RANK)[name]["losses"] != pytest.approx(plain, rel=1e-3), name
