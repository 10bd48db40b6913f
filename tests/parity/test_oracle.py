"""Our modules against the published code's numbers: every *.safetensors of AMCLIP_ORACLE_DIR, replayed step by step."""

import copy
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import SHARED
from tests.parity import oracle as o
from tests.parity.oracle import Oracle, Replay

FOLDER = Path(os.environ.get("AMCLIP_ORACLE_DIR", SHARED / "oracle"))
FILES = sorted(FOLDER.glob("*.safetensors"))
# Zero in exact arithmetic (a key's bias shifts all logits of a row alike; batch norm removes the bias before it), so
# rounding noise, and Adam makes a step of the learning rate out of it. The statistics of that batch norm follow them.
ZERO_GRADIENT = {
    "image_mlp.layer1.bias",
    "image_mlp.layer2.bias",
    "image_mlp.bn1.running_mean",
    "image_mlp.bn2.running_mean",
}

needs_oracle = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no oracle at {FOLDER} (set AMCLIP_ORACLE_DIR)")
every_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


@cache
def read(path: Path) -> Oracle:
    return o.read(path)


@cache
def replay(path: Path) -> Replay:
    return o.replay(read(path))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.float() - theirs.float()).abs().max().item()


def check_scores(oracle: Oracle, ours: Replay) -> None:
    for index, step in enumerate(ours.steps):
        for name, value in (("teacher_scores", step.teacher_scores), ("view_scores", step.view_scores)):
            off = distance(value, oracle.tensors[f"step{index}/{name}"])
            assert off <= 1e-8, f"step {index}: {name} off by {off}"


def check_kept(oracle: Oracle, ours: Replay) -> None:
    for index, step in enumerate(ours.steps):
        theirs = oracle.tensors[f"step{index}/kept"].sort(dim=-1).values
        assert torch.equal(step.kept.sort(dim=-1).values, theirs), f"step {index}: other tokens kept"


def check_losses(oracle: Oracle, ours: Replay) -> None:
    for index, step in enumerate(ours.steps):
        theirs = dict(oracle.meta["losses"][index])
        theirs["contra_loss"] = (theirs["contra_loss_1"] + theirs["contra_loss_2"]) / 2
        for name, value in step.losses.items():
            assert abs(value - theirs[name]) <= 1e-5, f"step {index}: {name} is {value}, not {theirs[name]}"


def check_outputs(oracle: Oracle, ours: Replay) -> None:
    for index, step in enumerate(ours.steps):
        for name, value in step.outputs.items():
            theirs = oracle.tensors[f"step{index}/out/{name}"]
            if name in ("image_embed", "text_embed"):  # ours are normalised already
                theirs = torch.nn.functional.normalize(theirs, dim=-1)
            off = distance(value, theirs)
            assert off <= 1e-3, f"step {index}: {name} off by {off}"  # heads: batch norm of features that hardly differ


def check_gradients(oracle: Oracle, ours: Replay) -> None:
    for index, step in enumerate(ours.steps):
        theirs = oracle.under(f"step{index}/grad/")
        assert {part for name in theirs for part in o.our_names(name)} == set(step.grads), "another set of gradients"
        for name, gradient in theirs.items():
            allowed = 1e-4 * gradient.abs().max().item() + 1e-6
            off = distance(o.from_ours(step.grads, name), gradient)
            assert off <= allowed, f"step {index}: gradient of {name} off by {off}, allowed {allowed}"


def check_weights(oracle: Oracle, ours: Replay) -> None:
    """Within 1e-5 wherever the gradient is not zero in exact arithmetic.

    Besides the tensors that the oracle names, that holds for the single elements whose gradient happens to cross zero:
    Adam divides by |g| + 1e-8, and there the oracle's own distance from an fp64 run (2e-8) decides. They must lie below
    the tolerance of the gradients, and be fewer than one in a thousand.
    """
    crossing = total = 0
    for name, theirs in oracle.under("after2/").items():
        if name in ZERO_GRADIENT or name.endswith("num_batches_tracked"):
            continue
        state = ours.student if o.student_name(name) is None else ours.teacher
        off = (o.from_ours(state, name) - theirs).abs() > 1e-5
        if name.endswith(("attn.qkv.bias", "attn.in_proj_bias")):
            off[theirs.shape[0] // 3 : 2 * theirs.shape[0] // 3] = False  # the key third
        total += off.numel()
        if off.any():
            assert off.sum() == (off & near_zero(oracle, name)).sum(), f"after the last step: {name} is off"
            crossing += int(off.sum())
    assert crossing < total / 1000, f"{crossing} of {total} elements off by more than 1e-5"


def near_zero(oracle: Oracle, name: str) -> torch.Tensor:
    """Where a gradient of some step is below the tolerance of the gradients."""
    gradients = [oracle.tensors.get(f"step{index}/grad/{name}") for index in range(oracle.steps)]
    assert all(gradient is not None for gradient in gradients), f"after the last step: {name} is off"
    return torch.stack([g.abs() < 1e-4 * g.abs().max() for g in gradients if g is not None]).any(0)


def check_optimizer(oracle: Oracle, fed: dict[str, torch.Tensor]) -> None:
    theirs = o.to_ours(oracle.under("after2/"), teacher=False)
    for name, weight in fed.items():
        off = distance(weight, theirs[name])
        assert off <= 1e-7, f"the optimizer on the oracle's gradients: {name} off by {off}"


def check_groups(oracle: Oracle, ours: Replay) -> None:
    def named(key: str) -> set[str]:
        return {part for name in oracle.meta[key] if o.student_name(name) is None for part in o.our_names(name)}

    assert ours.decayed == named("weight_decay_names")
    assert ours.frozen == named("frozen")


CHECKS: dict[str, Callable[[Oracle, Replay], None]] = {
    "scores": check_scores,
    "kept": check_kept,
    "losses": check_losses,
    "outputs": check_outputs,
    "gradients": check_gradients,
    "weights": check_weights,
    "groups": check_groups,
}


@needs_oracle
def test_the_oracle_folder_holds_a_file() -> None:
    assert FILES, f"{FOLDER} exists but holds no *.safetensors"


@needs_oracle
@every_file
@pytest.mark.parametrize("check", CHECKS)
def test_agrees(path: Path, check: str) -> None:
    CHECKS[check](read(path), replay(path))


@needs_oracle
@every_file
def test_optimizer_on_the_oracles_gradients(path: Path) -> None:
    check_optimizer(read(path), o.fed_optimizer(read(path)))


def nudge(tensor: torch.Tensor) -> None:
    """One element, off by a thousandth of the tensor's largest."""
    tensor.view(-1)[tensor.numel() // 2] += max(1e-3 * tensor.abs().max().item(), 1e-5)


def wrong_gradient(oracle: Oracle) -> None:
    nudge(oracle.tensors["step1/grad/visual.blocks.1.attn.qkv.weight"])


def wrong_small_gradient(oracle: Oracle) -> None:
    nudge(oracle.tensors["step0/grad/logit_scale"])


def wrong_kept_index(oracle: Oracle) -> None:
    kept = oracle.tensors["step1/kept"][1, -1]
    kept[-1] = min(set(range(196)) - set(kept.tolist()))


def wrong_loss(oracle: Oracle) -> None:
    oracle.meta["losses"][1]["simclr_loss"] += 2e-5


def wrong_fixed_pairing(oracle: Oracle) -> None:
    oracle.meta["losses"][0]["simclr_loss_fixed_pairing"] += 2e-5


def wrong_score(oracle: Oracle) -> None:
    oracle.tensors["step0/teacher_scores"][3, 7] += 2e-8


def wrong_weight(oracle: Oracle) -> None:
    weight = oracle.tensors["after2/visual.blocks.2.mlp.fc1.weight"]
    weight[oracle.tensors["step0/grad/visual.blocks.2.mlp.fc1.weight"].abs() > 1e-3] += 2e-5


def wrong_decay(oracle: Oracle) -> None:
    oracle.meta["weight_decay_names"].remove("visual.cls_token")


BREAKS = [
    ("gradients", wrong_gradient),
    ("gradients", wrong_small_gradient),
    ("kept", wrong_kept_index),
    ("losses", wrong_loss),
    ("losses", wrong_fixed_pairing),
    ("scores", wrong_score),
    ("weights", wrong_weight),
    ("groups", wrong_decay),
]


@needs_oracle
@every_file
@pytest.mark.parametrize(("check", "spoil"), BREAKS, ids=[spoil.__name__ for _, spoil in BREAKS])
def test_a_wrong_copy_fails(path: Path, check: str, spoil: Callable[[Oracle], None], tmp_path: Path) -> None:
    copied = Oracle(
        {name: tensor.clone() for name, tensor in read(path).tensors.items()}, copy.deepcopy(read(path).meta)
    )
    spoil(copied)
    save_file(copied.tensors, tmp_path / path.name)
    (tmp_path / path.name).with_suffix(".json").write_text(json.dumps(copied.meta))
    spoilt = o.read(tmp_path / path.name)
    with pytest.raises(AssertionError):
        CHECKS[check](spoilt, replay(path))


@needs_oracle
@every_file
def test_a_wrong_gradient_fails_the_optimizer(path: Path) -> None:
    copied = Oracle(dict(read(path).tensors), read(path).meta)
    gradient = copied.tensors["step0/grad/visual.cls_token"].clone()
    gradient[0, 0, 5] = -gradient[0, 0, 5]
    copied.tensors["step0/grad/visual.cls_token"] = gradient
    with pytest.raises(AssertionError):
        check_optimizer(copied, o.fed_optimizer(copied))
