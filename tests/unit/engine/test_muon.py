"""Muon alone, on one process: which parameters, how large an update, what decays. Engines: tests/distributed."""

import pytest
import torch
from torch import nn

from amclip_ds.engine.ds_config import EngineConfig, check_optimizer, read_ds_config
from amclip_ds.engine.muon import build_muon, eager_kernels, with_muon
from amclip_ds.errors import UserError
from amclip_ds.optim import MUON_RMS, OptimConfig, parameter_groups
from tests.unit.model import tiny

CONFIG = OptimConfig(name="muon", lr=1e-2, momentum=0.95, weight_decay=0.1)
MATRICES = {"vision.blocks.0.mlp.fc1.weight": (64, 16), "vision.blocks.0.mlp.fc2.weight": (16, 64)}


def test_the_matrices_of_the_blocks_and_no_others() -> None:
    groups = parameter_groups(tiny.student().named_parameters(), CONFIG)
    taken = {name for group in groups if group["use_muon"] for name in group["names"]}
    others = {name for group in groups if not group["use_muon"] for name in group["names"]}
    assert {"vision.blocks.0.attn.qkv.weight", "text.encoder.layers.0.mlp.fc2.weight"} <= taken
    assert {
        "vision.pos_embed",
        "vision.cls_token",
        "text.embeddings.token_embedding.weight",
        "logit_scale",
        "image_projection.weight",
        "vision.blocks.0.attn.qkv.bias",
        "vision.norm.weight",
        "objectives.simclr.head.layers.0.weight",
    } <= others
    adamw = parameter_groups(tiny.student().named_parameters(), OptimConfig(weight_decay=0.1))
    assert sorted(taken | others) == sorted(name for group in adamw for name in group["names"])


def step(parameters: dict[str, nn.Parameter], gradient: bool = True) -> None:
    optimizer = build_muon(parameter_groups(parameters.items(), CONFIG), CONFIG)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape) if gradient else torch.zeros_like(parameter)
    with eager_kernels(True):
        optimizer.step()


def test_an_update_is_as_large_as_adamw_s() -> None:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in MATRICES.items()}
    step(parameters)
    for name, parameter in parameters.items():
        size = float(parameter.detach().square().mean().sqrt()) / CONFIG.lr
        assert size == pytest.approx(MUON_RMS, rel=0.2), name  # five iterations come near to orthogonal


def test_the_update_is_orthogonal() -> None:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in MATRICES.items()}
    step(parameters)
    for parameter in parameters.values():
        values = torch.linalg.svdvals(parameter.detach())
        assert float(values.max() / values.min()) < 2.5
    gradient = torch.linalg.svdvals(torch.randn(64, 16) @ torch.diag(torch.logspace(0, -2, 16)))
    assert float(gradient.max() / gradient.min()) > 20, "the twin: what a gradient looks like"


def test_everything_decays_alike() -> None:
    """The scale of a matrix's learning rate must not be one of its decay."""
    names = [*MATRICES, "image_projection.weight", "vision.norm.weight"]
    parameters = {name: nn.Parameter(torch.ones(MATRICES.get(name, (8, 8)))) for name in names}
    parameters["vision.norm.weight"] = nn.Parameter(torch.ones(8))
    step(parameters, gradient=False)
    for name, parameter in parameters.items():
        kept = 1.0 if name == "vision.norm.weight" else 1 - CONFIG.lr * CONFIG.weight_decay
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, kept))


def test_its_deepspeed_config() -> None:
    for stage in (0, 1, 2, 3):
        ds = read_ds_config(EngineConfig(deepspeed=f"zero{stage}_fp32.json"))
        assert with_muon(ds).get("zero_optimization", {}).get("reduce_scatter") is (False if stage == 3 else None)
        check_optimizer(ds, "a file", "muon")


@pytest.mark.parametrize(
    ("file", "name", "said"),
    [
        ("zero3_bf16_zeropp.json", "muon", "muon reads whole gradients, and a file sets zero_hpz_partition_size, "),
        ("zero2_bf16_offload.json", "muon", "muon cannot step in host memory"),
        ("zero2_bf16_offload.json", "lion", "lion cannot step in host memory"),
    ],
)
def test_what_cannot_go_together_is_one_line(file: str, name: str, said: str) -> None:
    ds = read_ds_config(EngineConfig(deepspeed=file, allow_untested=True))
    with pytest.raises(UserError, match=f"optim.name: {said}") as caught:
        check_optimizer(ds, "a file", name)
    assert "\n" not in str(caught.value)
