"""The shapes that are known without torch, against the modules themselves."""

import pytest
import torch

from amclip_ds import config
from amclip_ds.errors import UserError
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import VisionConfig
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.model.vision import build_vit
from amclip_ds.objectives import builder
from amclip_ds.plan import shapes
from amclip_ds.plan.work import work_of
from tests.recipes import words_of

RECIPES = [name for name in config.recipe_names() if name.endswith("-tiny")] + ["aclip-vits16-moco"]
SETTINGS = {
    "sigmoid": ["loss.kind=sigmoid"],
    "layer norm": ["heads.norm=layer"],
    "trained patches": ["model.vision.freeze_patch_embed=false"],
    "clip": ["model.vision.name=vit_small_patch16_clip_224"],
    "half": ["teacher.resolution=half"],
    "an average that nothing reads": ["loss.o2e_weight=0", "mask.strategy=random", "teacher.always=true"],
}


def of_modules(
    settings: config.TrainConfig,
) -> tuple[dict[str, tuple[tuple[int, ...], bool]], dict[str, tuple[int, ...]]]:
    build = builder(method_of(settings).objectives)
    with torch.device("meta"):
        student, teacher = AClip(settings.model, build), TeacherModel(settings.model, build)
    needs = method_of(settings).needs_teacher
    return (
        {name: (tuple(p.shape), p.requires_grad) for name, p in student.named_parameters()},
        {name: tuple(p.shape) for name, p in teacher.named_parameters()} if needs else {},
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_parameters_of_its_modules(recipe: str) -> None:
    settings = config.load(recipe, words_of(recipe))
    step = work_of(settings, 1)
    student, teacher = of_modules(settings)
    assert [(name, (p.shape, p.requires_grad)) for name, p in step.student.items()] == list(student.items())
    assert {name: p.shape for name, p in step.teacher.items()} == teacher


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_change_shapes(words: list[str]) -> None:
    base = [] if "clip_224" in words[0] else ["model.vision.depth=2"]
    words = [*words, *base, "model.text.depth=1"]
    recipe = "aclip-tiny" if base else "aclip-vits16"
    if "clip_224" in words[0]:
        words[0] = "model.vision.name=vit_medium_patch16_clip_224"
    settings = config.load(recipe, words)
    step = work_of(settings, 1)
    student, teacher = of_modules(settings)
    assert {name: (p.shape, p.requires_grad) for name, p in step.student.items()} == student
    assert {name: p.shape for name, p in step.teacher.items()} == teacher


def built(settings: VisionConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_vit(settings).named_parameters()}


NAMES = [f"vit_{size}_patch{variant}" for size, (*_, variants) in shapes.NAMED.items() for variant in variants.split()]
SOME = {
    "vit_giant_patch14_clip_224",
    "vit_gigantic_patch14_224",
    "vit_betwixt_patch32_clip_224",
    "vit_huge_patch14_224",
}


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.nightly) for n in NAMES])
def test_a_named_tower_is_timms(name: str) -> None:
    settings = VisionConfig(name=name, image_size=int(name.split("_")[-1]))
    tower = shapes.tower_of(settings)
    assert {key: p.shape for key, p in shapes.vision_parameters(settings, tower).items()} == built(settings)
    with torch.device("meta"):
        assert build_vit(settings).blocks[0].attn.num_heads == tower.heads


def test_overrides_of_a_tower() -> None:
    settings = VisionConfig(name="vit_giant_patch14_224", patch_size=16, width=704, depth=3, heads=11)
    assert {key: p.shape for key, p in shapes.vision_parameters(settings, shapes.tower_of(settings)).items()} == built(
        settings
    )
    settings = VisionConfig(width=384, heads=6, mlp_ratio=2.5, depth=2)
    assert shapes.tower_of(settings).hidden == 960
    assert {key: p.shape for key, p in shapes.vision_parameters(settings, shapes.tower_of(settings)).items()} == built(
        settings
    )


def test_a_tower_that_only_timm_knows_is_built_or_refused() -> None:
    for name in ("deit_small_patch16_224", "flexivit_small"):  # the latter's class token has no position
        settings = VisionConfig(name=name)
        tower = shapes.tower_of(settings)
        assert tower.width == 384
        assert {key: p.shape for key, p in shapes.vision_parameters(settings, tower).items()} == built(settings)
    for name, why in (
        ("vit_base_patch28_224", "timm has no"),
        ("vit_intern300m_patch14_448", "is not a plain ViT"),
        ("vit_base_patch16_siglip_224", "cannot be the tower"),
    ):
        with pytest.raises(UserError, match=why):
            work_of(config.load("aclip-vitb16", [f"model.vision.name={name}"]), 1)
