import math

import pytest
import torch
from torch import nn

from amclip_ds import config as settings
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.objectives import builder
from amclip_ds.optim import (
    NAMES,
    OptimConfig,
    Schedules,
    build_optimizer,
    endless_warmup,
    lr_at,
    momentum_at,
    parameter_groups,
)
from tests.unit.model import tiny


def test_no_decay_for_biases_norms_and_the_logit_scale() -> None:
    student = tiny.student()
    groups = parameter_groups(student.named_parameters(), OptimConfig(weight_decay=0.3))
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert set(decay) == set(trainable)
    for name, parameter in trainable.items():
        assert decay[name] == (0.3 if parameter.ndim >= 2 else 0.0), name
    assert decay["logit_scale"] == 0 and decay["vision.pos_embed"] == decay["vision.cls_token"] == 0.3
    assert not any("patch_embed" in name for name in decay)
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def test_groups_by_true_shape_under_zero_3() -> None:
    """A partitioned parameter looks like an empty vector; by its looks nothing would decay."""
    partitioned = nn.Parameter(torch.empty(0))
    assert parameter_groups([("w", partitioned)], OptimConfig())[0]["weight_decay"] == 0
    partitioned.ds_shape = torch.Size([4, 4])  # type: ignore[attr-defined]
    assert parameter_groups([("w", partitioned)], OptimConfig())[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
def test_what_breaks_the_alignment_comes_last_of_all(layer_decay: float) -> None:
    recipe = settings.load("aclip-vitb16", ["loss.kind=sigmoid"])
    with torch.device("meta"):
        named = AClip(recipe.model, builder(method_of(recipe).objectives)).named_parameters()
    groups = parameter_groups(named, OptimConfig(layer_decay=layer_decay))
    sizes = [p.numel() for group in groups for p in group["params"]]
    odd = [place for place, size in enumerate(sizes) if size % 8]
    assert odd == [len(sizes) - 2, len(sizes) - 1], "the logit scale and the bias"


def test_muons_matrices_come_as_deepspeeds_muon_sorts_them() -> None:
    """The largest first: what a rank holds at a boundary is planned by this order (plan/model_state.py)."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = parameter_groups(tiny.student().named_parameters(), OptimConfig(name="muon"))
    of_muon = [group for group in groups if group["use_muon"]]
    named = dict(tiny.student().named_parameters())
    assert any(len({tuple(p.shape) for p in group["params"]}) > 1 for group in of_muon), "else no order shows"
    for group in of_muon:
        assert [tuple(named[name].shape) for name in group["names"]] == [tuple(p.shape) for p in group["params"]]
    before = [list(map(id, group["params"])) for group in groups]
    for group in groups:
        for p in group["params"]:
            p.use_muon = group["use_muon"]
    MuonWithAuxAdam(groups, torch.optim.AdamW, {"lr": 1e-3})
    assert [list(map(id, group["params"])) for group in groups] == before


def test_layer_decay_and_tower_scales() -> None:
    config = OptimConfig(layer_decay=0.5, vision_lr_scale=0.1, text_lr_scale=10, lr=1e-3)
    groups = parameter_groups(tiny.student().named_parameters(), config)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["vision.norm.weight"] == pytest.approx(0.1)
    assert scale["vision.blocks.2.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5)
    assert scale["vision.blocks.0.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5**3)
    assert scale["vision.pos_embed"] == pytest.approx(0.1 * 0.5**4)
    assert scale["text.final_layer_norm.bias"] == pytest.approx(10)
    assert scale["text.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(10 * 0.5)
    assert scale["text.embeddings.token_embedding.weight"] == pytest.approx(10 * 0.5**3)
    assert (
        scale["image_projection.weight"] == scale["objectives.simclr.head.layers.0.weight"] == scale["logit_scale"] == 1
    )
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in groups)
    plain = parameter_groups(tiny.student().named_parameters(), OptimConfig())
    assert len(plain) == 2 and all(group["lr_scale"] == 1 for group in plain)


def test_learning_rate() -> None:
    config = OptimConfig(lr=5e-4, warmup_steps=10, warmup_start_lr=1e-6, final_lr=1e-5)
    assert lr_at(0, 110, config) == 1e-6
    assert lr_at(5, 110, config) == pytest.approx((5e-4 + 1e-6) / 2)
    assert lr_at(10, 110, config) == 5e-4
    assert lr_at(60, 110, config) == pytest.approx((5e-4 + 1e-5) / 2)
    assert lr_at(110, 110, config) == lr_at(200, 110, config) == pytest.approx(1e-5)
    assert lr_at(0, 100, OptimConfig(lr=1e-3, warmup_steps=0)) == 1e-3
    assert lr_at(3, 3, OptimConfig(warmup_steps=10)) < 5e-4  # a run shorter than its warm-up


def test_a_warm_up_as_long_as_the_run_is_said() -> None:
    said, fix = endless_warmup(OptimConfig(warmup_steps=2000), 2000) or ("", "")
    assert said.endswith("the run has 2000: optim.lr is never reached") and fix == "optim.warmup_steps=100"
    assert endless_warmup(OptimConfig(warmup_steps=2000), 2001) is None
    assert endless_warmup(OptimConfig(warmup_steps=0), 1) is None
    assert endless_warmup(OptimConfig(warmup_steps=1), 1) is None, "there is no shorter one"


@pytest.mark.parametrize(
    ("epoch", "momentum"),
    [(0, 0.996), (1, 0.996016), (5, 0.996382), (12.5, 0.998), (20, 0.999618), (24, 0.999984), (25, 1.0)],
)
def test_momentum_of_the_paper(epoch: float, momentum: float) -> None:
    assert momentum_at(round(epoch * 3586), 25 * 3586, 0.996) == pytest.approx(momentum, abs=5e-7)


def test_schedules_read_both_settings() -> None:
    class Teacher:
        momentum = 0.95
        final_momentum = 0.998

    schedules = Schedules(OptimConfig(lr=1.0, warmup_steps=0, final_lr=0.0), Teacher(), 100)
    assert schedules.lr(50) == pytest.approx(0.5) and schedules.momentum(50) == pytest.approx((0.95 + 0.998) / 2)
    assert schedules.momentum(0) == 0.95 and schedules.momentum(100) == pytest.approx(0.998)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"muon"}))
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    target = torch.randn(32, 8)
    inputs = torch.randn(32, 8)
    config = OptimConfig(name=name, lr=0.02, weight_decay=0.0)
    optimizer = build_optimizer(parameter_groups(layer.named_parameters(), config), config)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0] and math.isfinite(losses[-1])
    assert all(group["lr_scale"] == 1 and group["lr"] == 0.02 for group in optimizer.param_groups)


def test_adamw_is_the_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    config = OptimConfig(lr=0.1, weight_decay=0.5, betas=[0.9, 0.98], eps=1e-8)
    optimizer = build_optimizer(parameter_groups([("w", weight)], config), config)
    w, m, v = weight.detach().clone().double(), torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for step, g in enumerate((torch.tensor([[0.3, -0.1]]), torch.tensor([[-0.2, 0.4]])), start=1):
        weight.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g.double() ** 2
        w = w * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.98**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "adam"},
        {"name": "lamb"},
        {"lr": -1.0},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"layer_decay": 0.0},
        {"clip_grad_norm": 1.0, "name": "muon"},
    ],
    ids=str,
)
def test_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{next(iter(changes))}"):
        OptimConfig(**changes)
