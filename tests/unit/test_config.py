"""Recipes, overrides, and what is said of each mistake."""

from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.errors import UserError

METHODS = ("clip", "flip", "random2x", "aclip", "aclip-eff")
SIZES = ("tiny", "vits16", "vits16-moco", "vitb16", "vitl16")


@pytest.mark.parametrize("name", [f"{method}-{size}" for method in METHODS for size in SIZES])
def test_every_recipe_loads_and_comes_back_from_its_dump(name: str, tmp_path: Path) -> None:
    loaded = config.load(name)
    file = tmp_path / "dumped.yaml"
    file.write_text(config.dump(loaded))
    again = config.load(str(file), [f"run.out={loaded.run.out}"])
    assert again == loaded
    assert name in config.recipe_names()


def test_a_change_is_not_lost_in_the_dump(tmp_path: Path) -> None:
    """The twin: two settings that differ have dumps that differ."""
    assert config.dump(config.load("aclip-tiny")) != config.dump(config.load("aclip-tiny", ["optim.eps=2e-8"]))


def test_what_the_methods_are() -> None:
    clip, flip, aclip, eff = (config.load(f"{name}-vitb16") for name in ("clip", "flip", "aclip", "aclip-eff"))
    assert (clip.data.num_views, clip.mask.strategy, config.needs_teacher(clip)) == (1, "none", False)
    assert (flip.data.num_views, flip.mask.strategy, config.needs_teacher(flip)) == (1, "random", False)
    assert (aclip.data.num_views, aclip.loss.o2o_weight, aclip.loss.o2e_weight) == (2, 1.0, 2.0)
    assert config.needs_teacher(aclip) and eff.teacher.resolution == "half"
    assert (aclip.optim.lr, aclip.optim.weight_decay, aclip.batch.global_size, aclip.run.epochs) == (
        5e-4,
        0.5,
        4096,
        25,
    )


def test_the_paper_s_small_tower_has_12_heads() -> None:
    assert config.load("aclip-vits16-moco").model.vision.heads == 12
    assert config.load("aclip-vits16").model.vision.heads is None  # timm's own: 6


def test_every_key_says_what_it_means() -> None:
    silent = [key for key, _, meaning in config.explain(config.load("aclip-tiny")) if not meaning]
    assert silent == []


@pytest.mark.parametrize(
    "override, said",
    [
        ("optim.learning_rate=1", r"optim.learning_rate: unknown key; did you mean optim\."),
        ("mask.keep_ration=0.5", "mask.keep_ration: unknown key; did you mean mask.keep_ratio?"),
        ("keep_ratio=0.5", "did you mean mask.keep_ratio?"),
        ("optim.lr=fast", "optim.lr: "),
        ("batch.global_size=1.5", "batch.global_size: "),
        ("mask.keep_ratio=0", "mask.keep_ratio: 0.0 is outside (0, 1]"),
        ("mask.unit=3", "mask.unit: 3 does not divide"),
        ("model.vision.image_size=60", "model.vision.image_size: 60"),
        ("optim=1", "optim: a section, not a key"),
        ("optim.lr", "expected key=value"),
        ("data.num_views=1", "loss.o2o_weight: this loss needs data.num_views=2"),
        ("data.train=$NOT_SET_ANYWHERE/x.tar", "NOT_SET_ANYWHERE"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("aclip-tiny", [override])
    text = str(error.value)
    assert said.replace("\\", "") in text and "\n" not in text


def test_text_values_expand_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SCRATCH", "/scratch/me")
    loaded = config.load("aclip-tiny", ["data.train=$SOME_SCRATCH/{00000..00009}.tar"])
    assert loaded.data.train == "/scratch/me/{00000..00009}.tar"


def test_a_yaml_of_one_s_own_builds_on_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: aclip-tiny\noptim: {lr: 0.25}\n")
    assert config.load(str(file)).optim.lr == 0.25
    assert config.load(str(file)).model == config.load("aclip-tiny").model
    file.write_text("recipe: aclip-tiny\noptim: {lrr: 0.25}\n")
    with pytest.raises(UserError, match="optim.lrr: unknown key; did you mean optim.lr.*mine.yaml"):
        config.load(str(file))


@pytest.mark.parametrize(
    "world_size, per_gpu, plan", [(1, 256, (96, 96, 1)), (4, 10, (24, 8, 3)), (3, 32, (32, 32, 1))]
)
def test_the_batch_falls_onto_the_world(world_size: int, per_gpu: int, plan: tuple[int, int, int]) -> None:
    found = config.plan_batch(config.BatchConfig(global_size=96, per_gpu=per_gpu), world_size)
    assert (found.local, found.micro, found.splits) == plan


def test_a_batch_that_does_not_divide_shows_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"100 = 3 ranks x 33 \+ 1 does not divide; use 99, or 2 ranks"):
        config.plan_batch(config.BatchConfig(global_size=100), 3)
