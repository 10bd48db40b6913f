"""What the shipped recipes say of themselves, and what they are."""

import re
from pathlib import Path

import pytest

from amclip_ds import cli, config
from amclip_ds.errors import UserError
from amclip_ds.masks import NONE
from amclip_ds.masks.units import num_kept
from amclip_ds.method import method_of
from amclip_ds.optim import lr_at
from amclip_ds.recipe_headers import GROUPS, PARTS, Header, all_headers, read_header
from tests.recipes import words_of

STEPS_PER_EPOCH = 3586  # YFCC-15M in batches of 4096
PUBLISHED = {  # as their own code has them (methods.md of the facts): views are cropped alone, patch embeddings trained
    "clip": (5e-4, 0.5, [0.9, 0.98], 3586),
    "flip": (5e-4, 0.2, [0.9, 0.95], 3586),
    "centered": (1e-3, 0.2, [0.9, 0.98], 10_000),
    "cluster": (5e-4, 0.2, [0.9, 0.98], 2000),
    "pgs": (1e-3, 0.2, [0.9, 0.98], 10_000),
    "slip": (3e-3, 0.1, [0.9, 0.98], 3586),
}
OTHER_LENGTHS = {  # not 25 epochs of batches of 4,096: what the header has to name of the source's, where it is known
    "centered": ("1,280", "30"),
    "cluster": ("2,048", "32"),
    "pgs": ("batches", "32"),
    "frequency": ("3,584", "30"),
    "salience": ("batch", "epochs"),
    "disjoint": ("1,800", "200"),
    "siglip": ("batch", "epochs"),
    "clipkd": ("1,024", "32"),
    "flip": ("65,536", "12.8 B"),
    "flip-tune": ("65,536", "128 M"),
    "clipa-pre": ("65,536", "2.4 B"),
    "clipa-tune": ("8,192", "131 M"),
}
AS_PUBLISHED = {"aclip", "aclip-eff", "aclip-muon", "clip", "detailclip", "maskclip", "random2x", "slip"}
KEPT = {
    "clip": 196,
    "flip": 98,
    "random2x": 98,
    "aclip": 100,
    "aclip-eff": 100,
    "centered": 98,
    "cluster": 137,
    "pgs": 137,
    "salience": 98,
    "disjoint": 98,
    "siglip": 196,
    "slip": 196,
    "detailclip": 100,
}


def is_complete(header: Header) -> bool:
    return bool(header.title) and tuple(header.parts) == PARTS and header.group in GROUPS


@pytest.mark.parametrize("header", all_headers(), ids=lambda header: header.method)
def test_every_recipe_says_where_it_is_from(header: Header) -> None:
    assert is_complete(header) and all(header.parts.values())
    assert header.title.endswith(".") and "\n" not in header.title


@pytest.mark.parametrize("header", all_headers(), ids=lambda header: header.method)
def test_a_batch_and_a_length_that_are_not_the_source_s_are_named(header: Header) -> None:
    loaded = config.load(f"{header.method}-vitb16", words_of(header.method))
    assert loaded.batch.global_size == 4096 and (loaded.run.epochs == 25 or header.method.endswith("-tune"))
    assert (header.method in AS_PUBLISHED) != (header.method in OTHER_LENGTHS)
    if loaded.optim.final_lr and header.method in OTHER_LENGTHS:  # whose cosines go to 0
        assert re.search(r"rate at the end|optimizer", header.parts["Inferred"])
    for word in OTHER_LENGTHS.get(header.method, ()):
        assert re.search(rf"(?<![\d,]){word}\b", header.parts["Inferred"])


def test_a_header_that_is_not_complete_says_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("# Own.\n# Source: here\n#   and there\nmask: {}\n")
    (tmp_path / "bare.yaml").write_text("mask: {}\n")
    monkeypatch.setattr("amclip_ds.recipe_headers.FOLDER", tmp_path)
    own = read_header("own")
    assert own.title == "Own." and own.parts == {"Source": "here and there"} and own.group == "others"
    assert not is_complete(own) and [header.method for header in all_headers()] == ["bare", "own"]


@pytest.mark.parametrize("method", list(KEPT))
def test_tokens_kept_at_b16(method: str) -> None:
    loaded = config.load(f"{method}-vitb16")
    assert {num_kept(mask, 14) for mask in method_of(loaded).masks} == {KEPT[method]}


@pytest.mark.parametrize("method", list(PUBLISHED))
def test_baselines_and_masks_train_as_published(method: str) -> None:
    loaded = config.load(f"{method}-vitb16")
    optim = loaded.optim
    assert (optim.lr, optim.weight_decay, list(optim.betas), optim.warmup_steps) == PUBLISHED[method]
    assert not loaded.model.vision.freeze_patch_embed and not loaded.data.photometric
    assert not method_of(loaded).needs_teacher


def test_tiny_keeps_its_own_optimizer() -> None:
    for header in all_headers():
        if header.method.endswith("-tune"):  # of tiny's
            continue
        loaded = config.load(f"{header.method}-tiny", words_of(header.method))
        assert (loaded.optim.lr, loaded.optim.weight_decay, loaded.optim.warmup_steps) == (1.5e-3, 0.05, 30)


@pytest.mark.parametrize(("method", "first", "part"), [("flip-tune", "flip", 0.01), ("clipa-tune", "clipa-pre", 0.1)])
@pytest.mark.parametrize("size", ["tiny", "vitb16", "vitl16"])
def test_a_second_stage_is_its_first_with_whole_images_and_a_smaller_rate(
    method: str, first: str, part: float, size: str
) -> None:
    second, before = config.load(f"{method}-{size}", words_of(method)), config.load(f"{first}-{size}")
    assert second.optim.lr == pytest.approx(part * before.optim.lr) and second.mask.strategy == NONE
    assert second.model.vision.pool == before.model.vision.pool and second.data == before.data
    assert second.model.text == before.model.text and second.optim.betas == before.optim.betas
    whole, cut = (loaded.model.vision.image_size for loaded in (second, before))
    assert whole == (64 if size == "tiny" else 224) and cut == (whole // 2 if first == "clipa-pre" else whole)
    length = (second.run.steps or 0) / (before.run.steps or 1) if size == "tiny" else (second.run.epochs or 0) / 25
    assert length < 0.11


@pytest.mark.parametrize("method", [header.method for header in all_headers()])
def test_the_rate_never_rises_after_its_warm_up(method: str) -> None:
    loaded = config.load(f"{method}-vitb16", words_of(method))
    assert falls_after_warm_up(loaded) and (not method.endswith("-tune") or loaded.optim.final_lr == 0)


def falls_after_warm_up(loaded: config.TrainConfig) -> bool:
    total = round((loaded.run.epochs or 0) * STEPS_PER_EPOCH)
    assert total > loaded.optim.warmup_steps
    rates = [lr_at(updates, total, loaded.optim) for updates in range(loaded.optim.warmup_steps, total + 1)]
    return all(after <= before for before, after in zip(rates, rates[1:]))


def test_a_rate_that_would_rise_is_refused_but_a_run_that_had_it_is_read(tmp_path: Path) -> None:
    words = [*words_of("flip-tune"), "optim.final_lr=1e-5"]
    with pytest.raises(UserError, match="optim.final_lr: 1e-05 is above optim.lr, 5e-06: .*; set optim.final_lr=0"):
        config.load("flip-tune-vitb16", words)
    file = tmp_path / "config.yaml"
    had = config.load("flip-tune-vitb16", words[:-1])
    had.optim.final_lr = 1e-5
    file.write_text(config.dump(had))
    assert config.load_run(file).optim.final_lr == 1e-5
    assert not falls_after_warm_up(config.load_run(file))
    config.load("flip-tune-vitb16", [*words, "optim.lr=0"])  # nothing moves: no peak that it could be above


def test_a_run_whose_settings_are_refused_by_now_is_repeated_and_resumed_as_it_was(tmp_path: Path) -> None:
    """Else no run of flip-tune of before could be: it had the rate that is refused, and with another one it drifts."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    words = [*words_of("flip-tune"), f"run.out={run}", "optim.final_lr=1e-5"]
    had = config.load("flip-tune-vitb16", words[:-1])
    had.optim.final_lr = 1e-5
    file = run / "config.yaml"
    file.write_text(config.dump(had))
    again = [f"run.out={tmp_path / 'again'}", "log.every_steps=1"]
    for recipe, given in ((str(file), again), ("flip-tune-vitb16", words)):
        with pytest.raises(UserError, match="^optim.final_lr: "):  # a yaml of that name alone, a run that never saved
            config.load(recipe, given)
    (run / "versions.json").write_text("{}")
    (run / "checkpoints" / "step_00000005").mkdir()
    assert config.load(str(file), again).optim.final_lr == 1e-5
    assert config.load("flip-tune-vitb16", words).optim.final_lr == 1e-5
    for key, other in (
        ("optim.final_lr", "optim.final_lr=2e-5"),
        ("loss.contrastive_weight", "loss.contrastive_weight=0"),
    ):
        own = words if key != "optim.final_lr" else words[:-1]
        for recipe, given in ((str(file), again), ("flip-tune-vitb16", own)):
            with pytest.raises(UserError, match=f"^{key}: "):  # it had none of these
                config.load(recipe, [*given, other])


def test_the_first_page_lists_a_group_s_recipes() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text()
    for group in ("masks that came after", "other objectives", "second stages"):
        (listed,) = re.findall(rf"{group} \(`([^`]+)`\)", page)
        assert sorted(listed.split()) == [header.method for header in all_headers() if header.group == group]


METHODS_PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
SECOND_STAGES = re.findall(r"`amclip train ([^`]*model\.init_from=[^`]*)`", METHODS_PAGE)


@pytest.mark.parametrize("command", SECOND_STAGES)
def test_the_documented_second_stages_train_at_rates_that_fall(command: str) -> None:
    recipe, *words = command.split()
    loaded = config.load(recipe, words)
    assert falls_after_warm_up(loaded)
    kept = {num_kept(mask, loaded.model.vision.grid) for mask in method_of(loaded).masks}
    assert (kept == {98}) == ("mask.strategy=random" in words)  # of 196, or 441 where images are larger


def test_the_documented_second_stages_are_found() -> None:
    assert len(SECOND_STAGES) == 5 and sum("mask.strategy=random" in command for command in SECOND_STAGES) == 1


@pytest.mark.parametrize("method", ["aclip", "aclip-eff", "aclip-muon", "random2x", "detailclip"])
def test_a_warm_up_shorter_than_the_published_epoch_is_said(method: str) -> None:
    assert config.load(f"{method}-vitb16").optim.warmup_steps == 2000
    assert "optim.warmup_steps=3586" in read_header(method).parts["Inferred"]


def test_a_start_that_is_needed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("flip-tune", "clipa-tune"):
        assert cli.main(["train", f"{method}-tiny", "data.train=x", "--procs", "2"]) == 2
        printed = capsys.readouterr().err.strip()
        assert f"model.init_from: recipe {method} needs it; name the run that it continues from" in printed
        assert len(printed.splitlines()) == 1


def test_the_paper_s_own_recipes_are_what_they_were() -> None:
    for method in ("aclip", "aclip-eff", "random2x"):
        loaded = config.load(f"{method}-vitb16")
        assert loaded.model.vision.freeze_patch_embed and loaded.data.photometric and loaded.optim.warmup_steps == 2000
        assert loaded.model.vision.pool == "cls" and loaded.data.num_views == 2


def test_masks_of_single_patches_have_units_of_one() -> None:
    for header in all_headers():
        loaded = config.load(f"{header.method}-vitb16", words_of(header.method))
        if loaded.mask.strategy not in (NONE, "attentive"):
            assert loaded.mask.unit == 1


def test_a_pipe_gets_the_names_and_one_recipe_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    names = capsys.readouterr().out.split()
    assert names == config.recipe_names() and "clip-vitb16" in names
    assert cli.main(["recipes", "clip-vitb16"]) == 0
    printed = capsys.readouterr().out
    assert "SLIP's baseline" in printed and "37.6" in printed and "Inferred: " in printed


def test_a_terminal_gets_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    from amclip_ds.commands import recipes

    recipes.print_methods()
    printed = capsys.readouterr().out
    assert all(group in printed for group in {header.group for header in all_headers()})
    assert all(header.method in printed for header in all_headers())


def test_the_method_of_a_name() -> None:
    assert config.method_of_recipe("aclip-eff-vits16-moco") == "aclip-eff"
    assert config.method_of_recipe("aclip-eff-vits16") == "aclip-eff"
    assert config.method_of_recipe("none-tiny") is None and config.method_of_recipe("x/clip-tiny") is None


def test_slip_has_a_plain_view_for_the_text_and_two_changed_ones_for_simclr() -> None:
    loaded = config.load("slip-vitb16")
    plain, *changed = loaded.data.all_views()
    assert plain.scale == (0.5, 1.0) and not plain.flip and not plain.photometric
    for view in changed:
        assert (view.scale, view.flip, view.photometric, view.colours) == ((0.08, 1.0), True, True, "simclr")
    objectives = method_of(loaded).objectives
    assert objectives["contrastive"].views == [0] and objectives["simclr"].views == [1, 2]
    assert objectives["simclr"].heads.norm_by == "view" and set(objectives) == {"contrastive", "simclr"}


@pytest.mark.parametrize(
    ("method", "gathers", "pairs"), [("slip", False, True), ("clip", False, None), ("aclip", True, False)]
)
def test_compat_release_is_each_methods_own_published_code(method: str, gathers: bool, pairs: bool | None) -> None:
    paper, release = (
        method_of(config.load(f"{method}-tiny", [f"compat={compat}"])).objectives for compat in ("paper", "release")
    )
    assert paper["contrastive"].gathers_gradient and release["contrastive"].gathers_gradient is gathers
    if pairs is not None:
        assert paper["simclr"].pairs_views and release["simclr"].pairs_views is pairs


def test_disjoint_views_share_a_crop_and_are_compared() -> None:
    loaded = config.load("disjoint-vitb16")
    first, second = loaded.data.all_views()
    assert second == first._replace(draws_of=0) and "occlusion" in method_of(loaded).objectives


@pytest.mark.parametrize(
    ("recipe", "word", "said"),
    [
        ("slip", "loss.o2o_views=[1,3]", "loss.o2o_views: there is no view 3; there are 3, from 0 to 2"),
        ("slip", "loss.views=[-1]", "loss.views: there is no view -1"),
        ("slip", "loss.o2o_views=[1]", "loss.o2o_views: [1] are not two views, which this loss compares"),
        ("slip", "loss.o2o_views=null", "loss.o2o_weight: this loss needs data.num_views=2, not 3"),
        ("aclip", "loss.o2e_views=[2]", "loss.o2e_views: there is no view 2; there are 2"),
        ("maskclip", "teacher.view=null", "teacher.view: loss.patches compares view 1 with what the teacher sees"),
        ("maskclip", "teacher.view=2", "teacher.view: there is no view 2; there are 2"),
        ("maskclip", "data.views.1.mask.strategy=none", "loss.patches.weight: view 1 keeps every token"),
        ("maskclip", "teacher.resolution=half", "teacher.view: the teacher then sees the view's size"),
        ("maskclip", "loss.patches.views=[0]", "loss.patches.weight: view 0 keeps every token"),
        (
            "maskclip",
            "data.views.1.mask.keep_ratio=1",
            "loss.patches.weight: view 1 keeps every token: data.views.1.mask.keep_ratio=1 of 64 units is all",
        ),
        ("maskclip", "data.views.1.mask.keep_ratio=0.99", "data.views.1.mask.keep_ratio=0.99 of 64 units is all"),
        ("clip", "loss.patches.weight=1", "loss.patches.views: there is no view 1; there are 1"),
        ("random2x", "loss.patches.weight=1", "teacher.view: loss.patches compares view 1"),
        ("aclip", "loss.patches.depth=0", "loss.patches.depth: 0 must be at least 1"),
        ("clip", "loss.mlm.share=1", "loss.mlm.share: 1.0 is outside (0, 1)"),
        ("maskclip", "loss.mlm.depth=0", "loss.mlm.depth: 0 must be at least 1"),
        ("frequency", "run.seed=0", "data.text_mask.table: data.text_mask.strategy=frequency needs it"),
        ("clipkd", "run.seed=0", "distill.teacher: loss.clipkd compares with a finished model"),
        ("clip", "loss.clipkd.weight=1", "distill.teacher: loss.clipkd compares with a finished model"),
        ("clip", "loss.clipkd.feature_weight=-1", "loss.clipkd.feature_weight: -1.0 must be 0 or more"),
        ("clip", "distill.teacher=run", "distill.teacher: no objective of this run reads it"),
        ("disjoint", "loss.occlusion.views=[0]", "loss.occlusion.views: [0] are not two views, which this loss"),
        ("disjoint", "loss.occlusion.views=[0,5]", "loss.occlusion.views: there is no view 5; there are 2"),
        ("maskclip", "loss.mlm.views=[2]", "loss.mlm.views: there is no view 2; there are 2"),
        ("clip", "loss.contrastive_weight=0", "loss.contrastive_weight: no objective has a weight"),
        ("clip", "loss.occlusion.weight=1", "loss.occlusion.weight: this loss needs data.num_views=2, not 1"),
        ("aclip", "mask.keep_ratio=0.05", "mask.keep_ratio: 0.05 of 16 units of 2 x 2 patches is less than one"),
        ("centered", "mask.keep_ratio=0.01", "mask.keep_ratio: 0.01 of 64 units of 1 x 1 patches is less than one"),
        ("slip", "data.colours=mocov3", "data.colours: 'mocov3' is none of aclip, simclr"),
        ("slip", "data.views.1.colours=x", "data.views.1.colours: 'x' is none of aclip, simclr"),
        ("slip", "heads.norm_by=views", "heads.norm_by: 'views' is neither batch nor view"),
        ("slip", "loss.release=moco", "loss.release: 'moco' is neither aclip nor slip"),
        ("clip", "model.vision.pool=avg", "model.vision.pool: 'avg' is neither cls nor mean"),
        ("centered", "mask.centered.sigma2=0", "mask.centered.sigma2: 0.0 is not above 0"),
        ("cluster", "mask.cluster.rule=both", "mask.cluster.rule: 'both' is neither topk nor fill"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_key(
    recipe: str, word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes", f"{recipe}-tiny", word]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and len(printed.splitlines()) == 1


def test_maskclip_reads_the_whole_view_and_predicts_the_rest_of_a_quarter_of_it() -> None:
    loaded = config.load("maskclip-vitb16")
    method = method_of(loaded)
    assert [num_kept(mask, 14) for mask in method.masks] == [196, 49]  # 147 places are predicted
    assert method.objectives["contrastive"].views == [0] and method.objectives["patches"].weight == 0.05
    assert method.teacher_view == 0 and method.wants == {"patches"} and method.needs_teacher
    assert loaded.data.all_views()[1].draws_of == 0
