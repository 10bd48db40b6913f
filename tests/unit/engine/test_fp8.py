"""engine.fp8 without fp8 units: torchao's emulation rounds as they do. What is asked for in vain is refused by name."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amclip_ds import config as settings
from amclip_ds import preconditions
from amclip_ds.engine import ds_config, fp8
from amclip_ds.engine.ds_config import EngineConfig, check_fp8, check_torchao, read_ds_config
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import AClip
from amclip_ds.model.teacher_model import TeacherModel
from tests.unit.model import tiny

CPU = torch.device("cpu")


def with_torchao(test: Any) -> Any:
    """Nightly, which installs it: with torchao in an environment transformers imports it, seconds and its warnings."""
    is_missing = importlib.util.find_spec("torchao") is None
    return pytest.mark.nightly(pytest.mark.skipif(is_missing, reason="needs the extra fp8")(test))


def made(kind: Any = tiny.student, **vision: object) -> Any:
    return kind(tiny.model_config(**vision)).bfloat16()


def images_and_texts() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    texts = torch.randint(1, tiny.EOS - 1, (6, 11), generator=draw)
    texts[:, -1] = tiny.EOS
    return torch.randn(6, 3, 32, 32, generator=draw), texts


def embeddings(model: AClip | TeacherModel) -> list[torch.Tensor]:
    images, texts = images_and_texts()
    return [model.embed_images(images), model.embed_texts(texts)]


def layers_in_fp8(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"]


@with_torchao
def test_layers_of_the_blocks_but_the_last_are_replaced_and_parameters_stay() -> None:
    model = made()
    before, state = dict(model.named_parameters()), {name: t.clone() for name, t in model.state_dict().items()}
    said = fp8.convert_towers(model, with_text=True, emulate=True)
    assert said == "8 of 12 in the image tower, 6 of 12 in the text tower"
    of_block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    of_layer = ("k_proj", "v_proj", "q_proj", "out_proj")
    wanted = [f"vision.blocks.{block}.{name}" for block in (0, 1) for name in of_block]
    wanted += [f"text.encoder.layers.0.self_attn.{name}" for name in of_layer]
    wanted += [f"text.encoder.layers.0.mlp.{name}" for name in ("fc1", "fc2")]
    assert layers_in_fp8(model) == wanted
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(type(parameter) is nn.Parameter for parameter in after.values())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@with_torchao
def test_the_teachers_text_tower_stays_in_bf16() -> None:
    model = made(tiny.teacher)
    assert fp8.convert_towers(model, with_text=False, emulate=True) == "8 of 12 in the image tower"
    assert all(name.startswith("vision.") for name in layers_in_fp8(model))


@with_torchao
def test_numbers_are_near_those_of_bf16_and_differ() -> None:
    """Twin: the same model without. As many tokens as no product takes without padding (6 x 11, 6 x 17)."""
    plain, converted = made(), made()
    fp8.convert_towers(converted, with_text=True, emulate=True)
    for mine, theirs in zip(embeddings(converted), embeddings(plain)):
        cosine = (mine * theirs).sum(-1)
        assert not torch.equal(mine, theirs) and float(cosine.detach().min()) > 0.97
        (mine.sum() + theirs.sum()).backward()
    ours, twins = dict(converted.named_parameters()), dict(plain.named_parameters())
    reached = [name for name, parameter in twins.items() if parameter.grad is not None]
    assert reached and all(ours[name].grad is not None for name in reached)
    for name in reached:
        mine, theirs = ours[name].grad.flatten().float(), twins[name].grad.flatten().float()
        assert mine.isfinite().all() and ours[name].grad.dtype == torch.bfloat16
        if not name.endswith("k_proj.bias"):  # what a softmax does not see: its gradient is roundings alone
            assert float(torch.cosine_similarity(mine, theirs, dim=0)) > 0.9, name


@with_torchao
def test_the_scores_of_a_teacher_in_inference_mode_are_near() -> None:
    plain, converted = made(tiny.teacher), made(tiny.teacher)
    fp8.convert_towers(converted, with_text=False, emulate=True)
    images, _ = images_and_texts()
    with torch.inference_mode():
        mine, theirs = (model(TeacherModel.attention, images) for model in (converted, plain))
    assert not torch.equal(mine, theirs) and torch.allclose(mine, theirs, rtol=0.1)


@with_torchao
def test_sizes_that_are_no_multiple_of_16_stay_in_bf16() -> None:
    """Width 40, four heads of 10; its MLP is of 80: only what has both sizes right is taken, and here nothing."""
    model = made(width=40)
    said = fp8.convert_towers(model, with_text=True, emulate=True)
    assert said == "0 of 12 in the image tower, 6 of 12 in the text tower"


@with_torchao
def test_whole_towers_compile_in_one_graph_with_the_same_numbers() -> None:
    model = made()
    fp8.convert_towers(model, with_text=True, emulate=True)
    _, texts = images_and_texts()
    compiled = torch.compile(model.text.pooled, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(texts), model.text.pooled(texts))


@with_torchao
def test_no_setting_emulates() -> None:
    assert not any("emulate" in key for key in settings.keys_and_types())
    model = made()
    fp8.convert_towers(model, with_text=True)
    assert not model.vision.blocks[0].mlp.fc1.config.emulate


@pytest.mark.parametrize("word", ["fp8", "true", "student", "null"])
def test_words(word: str) -> None:
    with pytest.raises(UserError, match=r"engine\.fp8: .*"):
        settings.load("aclip-tiny", [f"engine.fp8={word}"])


def refused(*words: str) -> str:
    with pytest.raises(UserError) as raised:
        preconditions.check_engine(settings.load(words[0], list(words[1:])))
    return str(raised.value)


def test_stage_3_and_fp32_are_refused() -> None:
    assert "engine.fp8: all needs a layer's whole weight, and zero3_bf16.json shards it" in refused(
        "aclip-tiny", "engine.fp8=all", "engine.deepspeed=zero3_bf16.json"
    )
    said = refused("aclip-tiny", "engine.fp8=teacher", "engine.deepspeed=zero2_fp32.json")
    assert "zero2_fp32.json is fp32; use engine.deepspeed=zero1_bf16.json" in said


@with_torchao
def test_a_teacher_that_nothing_reads_is_refused() -> None:
    bf16 = "engine.deepspeed=zero1_bf16.json"
    said = refused("clip-tiny", "engine.fp8=teacher", bf16)
    assert said == "engine.fp8: nothing of this run reads a teacher; use engine.fp8=all, or none"
    preconditions.check_engine(settings.load("clip-tiny", ["engine.fp8=all", bf16]))
    preconditions.check_engine(settings.load("aclip-tiny", ["engine.fp8=teacher", bf16]))


def test_torchao_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_config.importlib.util, "find_spec", lambda name: None)
    check_torchao(EngineConfig())
    with pytest.raises(UserError, match=r"engine\.fp8: all needs torchao, .*pip install 'amclip_ds\[fp8\]'"):
        check_torchao(EngineConfig(fp8="all"))


@with_torchao
def test_a_device_without_fp8_units_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^engine\.fp8: fp8 needs a GPU .*on the CPU; use engine\.fp8=none$"):
        fp8.check_machine(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"NVIDIA A100 has no fp8 units \(compute capability 8\.0; it takes 8\.9"):
        fp8.check_machine(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_machine(torch.device("cuda", 0))


def test_none_asks_for_nothing(tmp_path: Path) -> None:
    for file in ("zero0_fp32.json", "zero3_bf16.json"):
        engine = dataclasses.replace(EngineConfig(), deepspeed=file)
        check_fp8(read_ds_config(engine), engine)
