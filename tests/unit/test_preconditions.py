"""model.init_from of a run whose model computes something else with weights of the same shapes; settings that nothing
reads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amclip_ds import config, preconditions, run
from amclip_ds.errors import UserError
from amclip_ds.model import other_libraries, pretrained
from tests.unit.evaluate.exports import tiny_model, write_export, write_run


def run_of(folder: Path, recipe: str, *words: str) -> Path:
    """A run's folder as far as its settings, with a checkpoint's folder in it."""
    (folder / "checkpoints" / "step_00000003").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(config.load(recipe, list(words))))
    return folder


@pytest.mark.parametrize(
    ("before", "recipe", "said"),
    [
        (
            ["clip-tiny", "model.text.activation=quick_gelu"],
            "clip-tiny",
            "model.text.activation: gelu, but the weights",
        ),
        (["clip-tiny", "model.text.heads=2"], "clip-tiny", "model.text.heads: 4, but"),
        (["clip-vits16-moco"], "clip-vits16", "model.vision.heads: 6, but"),
        (
            ["clip-vitb16", "model.vision.name=vit_base_patch16_clip_224"],
            "clip-vitb16",
            "model.vision.name: vit_base_patch16_224, but",
        ),
        (
            ["clip-vitb16", "model.vision.name=vit_base_patch16_clip_quickgelu_224"],
            "aclip-vitb16",
            "model.vision.name: vit_base_patch16_224, but",
        ),
    ],
)
@pytest.mark.parametrize("part", ["", "checkpoints/step_00000003", "student.safetensors"])
def test_a_run_whose_weights_would_compute_something_else(
    before: list[str], recipe: str, said: str, part: str, tmp_path: Path
) -> None:
    source = run_of(tmp_path / "before", *before) / part
    if source.suffix:
        source.touch()
    words = [f"model.init_from={source}", f"run.out={tmp_path}/run"]
    with pytest.raises(UserError) as error:
        preconditions.check_init(config.load(recipe, words))
    key, wanted = str(error.value).split(":")[0], str(error.value).rpartition("=")[2]
    assert str(error.value).startswith(said) and str(error.value).endswith(f"; set {key}={wanted}")
    preconditions.check_init(config.load(recipe, [*words, f"{key}={wanted}"]))
    run_of(tmp_path / "run", recipe)  # it resumes: its weights are its checkpoint's
    preconditions.check_init(config.load(recipe, words))


def test_heads_that_a_name_says_are_those_that_a_key_says(tmp_path: Path) -> None:
    source = run_of(tmp_path / "before", "clip-vitb16", "model.vision.heads=12")
    preconditions.check_init(config.load("aclip-vitb16", [f"model.init_from={source}", f"run.out={tmp_path}/run"]))


@pytest.mark.parametrize(("before", "recipe"), [("clip-vits16", "clip-vitb16"), ("clip-tiny", "clip-vitb16")])
def test_a_model_of_another_size_is_not_called_one_of_other_heads(before: str, recipe: str, tmp_path: Path) -> None:
    """No number of heads makes these weights fit: their reader names what does not."""
    source = run_of(tmp_path / "before", before)
    preconditions.check_init(config.load(recipe, [f"model.init_from={source}", f"run.out={tmp_path}/run"]))


def test_settings_of_another_trainer_beside_the_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {text: {activation: relu}}\n")
    save_file({"cls_token": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded = config.load("clip-tiny", [f"model.init_from={source}", f"run.out={tmp_path}/run"])
        preconditions.check_init(loaded)
        assert preconditions.about_pooling(loaded) == []


TIMM, CLIP = "vit_base_patch16_224", "vit_base_patch16_clip_224"


@pytest.mark.parametrize("fmt", ["open_clip", "transformers CLIPModel", "timm"])
@pytest.mark.parametrize("tower", [TIMM, CLIP])
def test_a_start_from_a_tower_with_another_norm(fmt: str, tower: str, tmp_path: Path) -> None:
    """OpenAI's and LAION's models have one before their blocks: without it all other weights fit, and compute something
    else. The other way round too."""
    ours = {rule.ours[0]: rule.theirs[0] for rule in other_libraries.FORMATS[fmt] if "#" not in rule.theirs[0]}
    held = [theirs for name, theirs in ours.items() if tower == CLIP or "norm_pre" not in name]
    save_file({theirs: torch.zeros(1) for theirs in held}, tmp_path / "model.safetensors")

    def check(name: str) -> None:
        words = [f"model.init_from={tmp_path}", f"run.out={tmp_path}/run", f"model.vision.name={name}"]
        preconditions.check_init(config.load("clip-vitb16", words))

    pretrained.open_source.cache_clear()
    check(tower)
    other = TIMM if tower == CLIP else CLIP
    with pytest.raises(UserError, match=f"^model.vision.name: {other} has .* set model.vision.name to .* {tower}$"):
        check(other)


@pytest.mark.parametrize("fmt", ["open_clip", "hf"])
def test_a_start_from_an_export_with_another_activation(fmt: str, tmp_path: Path) -> None:
    write_export(fmt, tmp_path / "export")  # of gelu
    for source in (tmp_path / "export", next((tmp_path / "export").glob("*.safetensors"))):
        words = [f"model.init_from={source}", f"run.out={tmp_path}/run"]
        preconditions.check_init(config.load("aclip-tiny", words))
        with pytest.raises(
            UserError, match="^model.text.activation: quick_gelu, but .* set model.text.activation=gelu$"
        ):
            preconditions.check_init(config.load("aclip-tiny", [*words, "model.text.activation=quick_gelu"]))


@pytest.mark.parametrize(("pool", "is_said"), [("mean", True), ("cls", False)])
def test_a_start_from_a_run_that_pools_otherwise_prints_a_warning(pool: str, is_said: bool, tmp_path: Path) -> None:
    """No refusal: a second stage may be meant to change it."""
    write_run(tmp_path / "before")  # of class tokens
    loaded = config.load("aclip-tiny", [f"model.init_from={tmp_path}/before", f"model.vision.pool={pool}"])
    preconditions.check_init(loaded)
    student: Any = SimpleNamespace(in_fp8="", module=tiny_model()[0])
    lines = run.describe_engines(loaded, student, None)
    assert "parameters from" in lines[0]
    warned = [line for line in lines if "model.vision.pool is mean," in line and "was trained with cls" in line]
    assert len(warned) == int(is_said)


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("clip", ["mask.keep_ratio=0.5"], ["mask.keep_ratio: warning: 0.5 is not read: no view has a mask"]),
        ("maskclip", ["mask.keep_ratio=0.5"], ["mask.keep_ratio: warning: 0.5 is not read: each masked view has its"]),
        ("aclip", ["mask.keep_ratio=0.25", "data.views.1.mask.strategy=none"], []),
        ("aclip", ["mask.pgs.rule=fill"], ["mask.pgs.rule: warning: not read: mask.pgs is no strategy of this run's"]),
        ("pgs", ["mask.pgs.rule=fill"], []),
        ("aclip", ["mask.pgs.rule=fill", "data.views.1.mask.strategy=pgs"], []),
        (
            "aclip",
            ["loss.detailclip.depth=2", "loss.detailclip.start=0.5"],
            ["loss.detailclip.start, loss.detailclip.depth: warning: not read: loss.detailclip.weight is 0"],
        ),
        ("clip", ["data.text_mask.tokens=9"], ["data.text_mask: warning: not read: data.text_mask.strategy is none"]),
    ],
)
def test_settings_that_nothing_reads_are_said(recipe: str, words: list[str], said: list[str]) -> None:
    lines = preconditions.about_unread(config.load(f"{recipe}-tiny", words))
    assert len(lines) == len(said) and all(line.startswith(part) for line, part in zip(lines, said)), lines


@pytest.mark.parametrize("recipe", [name for name in config.recipe_names() if name.endswith(("-tiny", "-vitb16"))])
def test_a_recipe_has_no_setting_that_nothing_reads(recipe: str) -> None:
    needed = {"clipkd": "distill.teacher=x", "frequency": "data.text_mask.table=x"}
    method = str(config.method_of_recipe(recipe))
    words = ["model.init_from=x"] if method.endswith("-tune") else [needed[method]] if method in needed else []
    assert preconditions.about_unread(config.load(recipe, words)) == []
