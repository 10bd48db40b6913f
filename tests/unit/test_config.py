"""Recipes, overrides, and what is said of each mistake."""

import pickle
from functools import cache, reduce
from pathlib import Path

import pytest

from amclip_ds import cli, config, configfile
from amclip_ds.errors import SettingsError, UserError
from amclip_ds.method import method_of
from amclip_ds.recipe_headers import all_headers
from tests.recipes import words_of

METHODS = tuple(header.method for header in all_headers())
SIZES = ("tiny", "vits16", "vits16-moco", "vitb16", "vitl16")


@pytest.mark.parametrize("name", [f"{method}-{size}" for method in METHODS for size in SIZES])
def test_every_recipe_loads_and_comes_back_from_its_dump(name: str, tmp_path: Path) -> None:
    loaded = config.load(name, words_of(name))
    file = tmp_path / "dumped.yaml"
    file.write_text(config.dump(loaded))
    again = config.load(str(file), [f"run.out={loaded.run.out}"])
    assert again == loaded
    assert name in config.recipe_names()


def test_a_change_is_not_lost_in_the_dump(tmp_path: Path) -> None:
    """The twin: two settings that differ have dumps that differ."""
    assert config.dump(config.load("aclip-tiny")) != config.dump(config.load("aclip-tiny", ["optim.eps=2e-8"]))


@pytest.mark.parametrize("text", ["1e5", "1", "1.0", "yes", "null", "0x1f", "1:30", "2024-01-01", "", "a: b #", "é"])
def test_a_text_of_any_look_comes_back_from_its_dump(text: str, tmp_path: Path) -> None:
    loaded = config.load("aclip-tiny", [f"data.train={text}"])
    file = tmp_path / "dumped.yaml"
    file.write_text(config.dump(loaded))
    again = config.load(str(file))
    assert again.data.train == text


def test_every_key_is_merged_as_the_type_it_declares() -> None:
    """What coerce() lets through, OmegaConf takes: a value of each key's type, over null where the key takes that."""
    samples = {bool: True, int: 3, float: 0.25, str: "text"}
    for key, hint in config.keys_and_types().items():
        if configfile.item_kind(hint):
            continue
        base = next(kind for kind in samples if kind.__name__ in str(hint))
        value = [samples[base]] if "list[" in str(hint) else samples[base]
        layers = [{key: None}] if "None" in str(hint) else []
        try:
            merged = configfile.merge(config.settings_type(), [*layers, {key: value}], {})
        except SettingsError as error:  # the section's own check
            assert str(error).startswith(key.rpartition(".")[0]), error
        else:
            found = reduce(getattr, key.split("."), merged)
            means = "auto" if key == "engine.compile" else value  # its true is the older word for it
            assert found == means and type(found) is type(means), key


def test_what_the_methods_are() -> None:
    clip, flip, aclip, eff = (config.load(f"{name}-vitb16") for name in ("clip", "flip", "aclip", "aclip-eff"))
    assert (clip.data.num_views, clip.mask.strategy, method_of(clip).needs_teacher) == (1, "none", False)
    assert (flip.data.num_views, flip.mask.strategy, method_of(flip).needs_teacher) == (1, "random", False)
    assert (aclip.data.num_views, aclip.loss.o2o_weight, aclip.loss.o2e_weight) == (2, 1.0, 2.0)
    assert method_of(aclip).needs_teacher and eff.teacher.resolution == "half"
    assert (aclip.optim.lr, aclip.optim.weight_decay, aclip.batch.global_size, aclip.run.epochs) == (
        5e-4,
        0.5,
        4096,
        25,
    )


def test_half_of_an_image_that_is_no_whole_number_of_patches() -> None:
    with pytest.raises(UserError, match=r"teacher.resolution: half of model.vision.image_size=112 is 56 pixels"):
        config.load("aclip-eff-vitb16", ["model.vision.image_size=112", "mask.unit=1"])


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


@pytest.mark.parametrize(
    "local, per_gpu, plan",
    [(683, 256, (228, 3)), (293, 256, (147, 2)), (341, 256, (171, 2)), (7, 3, (3, 3)), (5, 2, (2, 3)), (3, 1, (1, 3))],
)
def test_a_rank_s_batch_that_divides_by_little_has_splits_that_are_not_equal(
    local: int, per_gpu: int, plan: tuple[int, int]
) -> None:
    """4,098 on 6 GPUs, which the refusal of 4,096 proposes, would otherwise be 683 splits of one sample."""
    found = config.plan_batch(config.BatchConfig(global_size=6 * local, per_gpu=per_gpu), 6)
    assert (found.local, found.micro, found.splits) == (local, *plan)
    assert (found.splits - 1) * found.micro < local <= found.splits * found.micro
    assert found.split_in_words == f"{plan[1]} splits of {plan[0]}" + (" or less" if local % plan[0] else "")


@pytest.mark.parametrize("local", range(1, 65))
def test_every_split_holds_half_of_what_it_may_or_more(local: int) -> None:
    for per_gpu in range(1, 70):
        micro = config.split_of(local, per_gpu)
        assert 2 * micro >= min(per_gpu, local) and micro <= per_gpu


def test_a_batch_that_does_not_divide_shows_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"100 = 3 ranks x 33 \+ 1 does not divide; use 99, or 2 ranks"):
        config.plan_batch(config.BatchConfig(global_size=100), 3)


NO_NUMBERS = ("-1", "nan", "inf", "-inf", "1e400", "1" + "0" * 40, "many", "", "true", "[1]", "{a: 1}", "0x10")


@pytest.mark.parametrize("text", [*NO_NUMBERS, "0"])
def test_what_is_no_fit_number_is_refused_in_every_numeric_key(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And zero, wherever it is not refused, loads without a traceback."""
    fine = {
        ("-1", "mask.cluster.threshold"),
        ("-1", "mask.pgs.threshold"),
        ("0x10", "data.weights"),
        (NO_NUMBERS[5], "data.weights"),
        (NO_NUMBERS[5], "guards.spike_deviations"),
    }
    for name in ("keys_and_types", "_layers"):  # read once, not for each of a thousand loads
        monkeypatch.setattr(config, name, cache(getattr(config, name)))
    numeric = {
        key: str(hint) for key, hint in config.keys_and_types().items() if "int" in str(hint) or "float" in str(hint)
    }
    assert len(numeric) > 40
    for key, hint in numeric.items():
        try:
            config.load("aclip-tiny", [f"{key}=[{text},{text}]" if hint.startswith("list[float]") else f"{key}={text}"])
        except UserError as error:
            assert "\n" not in str(error) and key.split(".")[0] in str(error)
        else:
            a_list = text == "[1]" and hint.startswith("list[int]")
            assert text == "0" or (text, key) in fine or a_list, (key, text)


@pytest.mark.parametrize(
    "words, steps, epochs",
    [
        (["run.steps=5000"], 5000, None),
        (["run.epochs=3"], None, 3.0),
        (["run.steps=null", "run.epochs=3"], None, 3.0),
        (["run.epochs=null", "run.steps=7"], 7, None),
    ],
)
@pytest.mark.parametrize("recipe", ["aclip-vits16", "aclip-tiny"])  # one has epochs, the other steps
def test_a_length_that_is_given_replaces_the_recipe_s(
    words: list[str], steps: int | None, epochs: float | None, recipe: str
) -> None:
    run = config.load(recipe, words).run
    assert (run.steps, run.epochs) == (steps, epochs)


def test_a_length_replaces_that_of_the_yaml_it_is_based_on(tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("recipe: aclip-vits16\nrun: {steps: 10}\n")
    mine.write_text(f"recipe: {base}\nrun: {{epochs: 2}}\n")
    assert (config.load(str(base)).run.steps, config.load(str(base)).run.epochs) == (10, None)
    assert (config.load(str(mine)).run.steps, config.load(str(mine)).run.epochs) == (None, 2.0)
    assert config.load(str(mine), ["run.steps=4"]).run.epochs is None
    dumped = tmp_path / "config.yaml"  # a resume, or a new run of an old one's settings
    dumped.write_text(config.dump(config.load(str(mine))))
    assert config.load(str(dumped), ["run.steps=4"]).run.epochs is None


def test_both_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run.steps and run.epochs: give one"):
        config.load("aclip-tiny", ["run.steps=5", "run.epochs=1"])
    (tmp_path / "both.yaml").write_text("recipe: aclip-tiny\nrun: {steps: 5, epochs: 1}\n")
    with pytest.raises(UserError, match="give one of them.*both.yaml"):
        config.load(str(tmp_path / "both.yaml"))


@pytest.mark.parametrize(
    "words, said",
    [
        (["data.train=/x/00000.tar", "data.train=/x/00001.tar"], "write 'data.train=/x/{00000..00001}.tar'"),
        ([f"data.train=/x/{n:05d}.tar" for n in range(9, 12)], "write 'data.train=/x/{00009..00011}.tar'"),
        (["data.train=/x/a.tar", "data.train=/x/b.tar"], "write 'data.train=/x/{a,b}.tar'"),
        (["optim.lr=1", "optim.lr=2"], "optim.lr is given 2 times: optim.lr=1 and optim.lr=2; give it once"),
        (["eval.data=/x/0.tar", "eval.data=/x/1.tar"], "write 'eval.data=/x/{0..1}.tar'"),
        (["optim.lr=1e-3", "optim.lr=1e-4"], "optim.lr=1e-3 and optim.lr=1e-4; give it once"),
        (["run.out=/a/r2", "run.out=/proc/x"], "run.out=/a/r2 and run.out=/proc/x; give it once"),
        (["run.seed=1", "run.seed=1"], "run.seed is given 2 times"),
    ],
)
def test_a_key_given_twice_is_refused_with_the_quotes(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("aclip-tiny", words)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("run:\n", None),  # an empty section sets nothing
        ("run: 5\n", "run: 5 is no section"),
        ("- 1\n", "expected `key: value` lines"),
        ("optim: {lr: 1, lr: 2}\n", "'lr' is given twice in one map (line 2)"),
        ("optim.lr: 1\n", "optim.lr: nest it in a yaml"),
        ("data: {captions: txt}\n", "takes a list of texts"),
        ("data: {captions: [[txt]]}\n", "data.captions: ['txt'] does not fit"),
        ("data: {captions: [{a: b}]}\n", "data.captions: {'a': 'b'} does not fit"),
        ("optim: {betas: [0.9, x]}\n", "optim.betas: 'x' does not fit; it takes a number"),
        ("run: {seed: 2021-01-01}\n", "run.seed: "),
        ("run: {out: ${oc.env:HOME}}\n", "not a yaml file"),
        ("run: {out: '${oc.env:HOME}'}\n", "filled in only"),
        ("a: &a [1]\nb: *a\n", "a: unknown key"),
        ("a: &a [*a]\n", "holds itself"),
        ("a: &a [1]\n" + "".join(f"{c}: &{c} [{f'*{p},' * 10}]\n" for p, c in zip("abcdefg", "bcdefgh")), "more than"),
        ("[" * 3000, "not a yaml file"),
        ("run: !!python/object/apply:os.system ['true']\n", "not a yaml file"),
        ("run: {seed: 1}\n--- \nrun: {seed: 2}\n", "not a yaml file"),
        ("recipe: [1]\n", "recipe: [1] is no name"),
        ("run: {name: x}\n", "run.name: unknown key; did you mean run.out?"),
        ("1: 2\n", "1: unknown key"),
    ],
)
def test_a_yaml_of_another_shape(text: str, said: str | None, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text if text.startswith(("recipe", "- ")) else f"recipe: aclip-tiny\n{text}")
    if said is None:
        assert config.load(str(file)).run.steps == 1000
    else:
        with pytest.raises(UserError) as error:
            config.load(str(file))
        assert said in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_other_kinds_of_recipe_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "circle.yaml").write_text(f"recipe: {tmp_path}/circle.yaml\n")
    (tmp_path / "folder.yaml").mkdir()
    for name, said in (
        ("binary.yaml", "not UTF-8"),
        ("run", "config.yaml"),
        ("mine.json", "not a yaml by its name"),
        ("circle.yaml", "based on itself"),
        ("none.yaml", "no such file"),
        ("", "a folder"),
        ("folder.yaml", "folder.yaml"),
    ):
        with pytest.raises(UserError) as error:
            config.load(str(tmp_path / name))
        assert said in str(error.value), str(error.value)
    for name, said in {
        "aclip": "did you mean aclip-tiny",
        "vitb16": "clip-vitb16",
        "aclip_ViTB16": "aclip-vitb16",
        "optim.lr=1": "the recipe comes first",
    }.items():
        with pytest.raises(UserError, match=said):
            config.load(name)


@pytest.mark.parametrize("words, steps", [(["run.steps=7"], 7), (["run.epochs=0.5"], 4), (["run.epochs=3"], 27)])
def test_the_length_in_steps(words: list[str], steps: int) -> None:
    assert config.count_steps(config.load("aclip-tiny", words), steps_per_epoch=9) == steps


def test_a_length_of_no_step_is_refused() -> None:
    """Else a run would end at once, well, and hand over untrained weights."""
    with pytest.raises(UserError, match="run.epochs: 0.01 of an epoch of 9 steps is no step"):
        config.count_steps(config.load("aclip-tiny", ["run.epochs=0.01"]), steps_per_epoch=9)
    with pytest.raises(UserError, match="batch.global_size: 64 is more than an epoch's samples"):
        config.count_steps(config.load("aclip-tiny", ["run.epochs=3", "batch.global_size=64"]), steps_per_epoch=0)


@pytest.mark.parametrize(
    "rank, words, is_reported",
    [
        (0, ["aclip-tiny", "optim.lrr=1"], True),
        (1, ["aclip-tiny", "optim.lrr=1"], False),  # rank 0 reports what all ranks read alike
        (1, ["/nowhere.yaml"], True),  # which this machine alone may lack
        (1, ["aclip-tiny", "data.train=$NOT_SET_ANYWHERE/x.tar"], True),
    ],
)
def test_a_mistake_is_reported_by_one_rank(
    rank: int, words: list[str], is_reported: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    assert cli.main(["recipes", *words]) == 2
    assert bool(capsys.readouterr().err) == is_reported


def test_settings_with_sections_go_from_rank_to_rank() -> None:
    loaded = config.load("aclip-tiny", ["data.train=x.tar"])
    again = pickle.loads(pickle.dumps(loaded))
    assert again == loaded and type(again) is type(loaded)
