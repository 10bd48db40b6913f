"""data.views: how a list of sections is given, overridden, dumped, explained, and what is said of each mistake."""

from pathlib import Path

import pytest

from amclip_ds import config, configfile
from amclip_ds.errors import SettingsError, UserError
from amclip_ds.export.card import masks_in_words
from amclip_ds.method import method_of

DISJOINT = ["mask.strategy=disjoint", "data.views.1.same_crop_as=0"]
THREE = "data.views=[{}, {flip: true, scale: [0.2, 1]}, {same_crop_as: 1, mask: {strategy: none}}]"


def load(*words: str, recipe: str = "random2x-tiny") -> config.TrainConfig:
    return config.load(recipe, list(words))


def kept(loaded: config.TrainConfig, progress: float = 0.0) -> list[tuple[tuple[int, ...], list[str]]]:
    return [(group.views, [mask.strategy for mask, _ in group.masks]) for group in method_of(loaded).groups(progress)]


def test_one_key_of_one_view() -> None:
    loaded = load("data.views.1.mask.keep_ratio=0.25", "data.views.1.photometric=no")
    masks, views = method_of(loaded).masks, loaded.data.all_views()
    assert [mask.keep_ratio for mask in masks] == [0.5, 0.25] and {mask.strategy for mask in masks} == {"random"}
    assert [view.photometric for view in views] == [True, False] and len(loaded.data.views) == 2


def test_what_is_left_out_is_what_mask_and_photometric_say() -> None:
    loaded = load(THREE, "mask.keep_ratio=0.25", "data.photometric=false")
    assert loaded.data.num_views == 3
    assert [mask.keep_ratio for mask in method_of(loaded).masks] == [0.25] * 3
    first, second, third = loaded.data.all_views()
    assert second == config.View((0.2, 1.0), second.ratio, True, False) and third == second._replace(draws_of=1)
    assert not first.flip and not first.photometric


def test_views_that_keep_equally_many_go_together() -> None:
    assert kept(load(THREE)) == [((0, 1), ["random"]), ((2,), ["none"])]
    mixed = load(
        "data.num_views=4",
        "data.views.1.mask.keep_ratio=0.25",
        "data.views.2.mask.strategy=attentive",
        "data.views.3.mask.keep_ratio=0.25",
    )
    assert kept(mixed) == [((0, 2), ["random", "attentive"]), ((1, 3), ["random"])]


def test_num_views_still_decides_where_no_list_does() -> None:
    assert load("data.num_views=3").data.views == [] and len(load("data.num_views=3").data.all_views()) == 3
    assert load().data.all_views() == load("data.views=[]").data.all_views()


def test_a_list_in_a_later_layer_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("recipe: random2x-tiny\ndata: {views: [{flip: true}, {}, {flip: true}]}\n")
    mine.write_text(f"recipe: {base}\ndata: {{views: [{{}}, {{photometric: false}}]}}\n")
    assert [view.flip for view in config.load(str(base)).data.all_views()] == [True, False, True]
    assert [view.flip for view in config.load(str(mine)).data.all_views()] == [False, False]
    mine.write_text(f"recipe: {base}\ndata: {{views: {{1: {{flip: true}}}}}}\n")  # one item, by its place
    assert [view.flip for view in config.load(str(mine)).data.all_views()] == [True, True, True]
    assert [view.flip for view in config.load(str(mine), ["data.views.0.flip=false"]).data.all_views()] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("words", [(THREE,), ("data.views.1.mask.keep_ratio=0.25",), (), ("data.num_views=1",)])
def test_the_dump_gives_the_same_views_back(words: tuple[str, ...], tmp_path: Path) -> None:
    loaded, file = load(*words), tmp_path / "config.yaml"
    file.write_text(config.dump(loaded))
    assert config.load(str(file)) == loaded
    again = config.load(str(file), ["data.views.0.mask.keep_ratio=0.75"])
    assert method_of(again).masks[0].keep_ratio == 0.75 and method_of(again).masks[1:] == method_of(loaded).masks[1:]


def test_a_config_of_before_there_was_a_list_loads(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    lines = [line for line in config.dump(load()).splitlines() if "views: []" not in line]
    file.write_text("\n".join(lines))
    assert config.load(str(file)) == load()


def test_the_explanation_has_every_view_in_full() -> None:
    rows = {key: value for key, value, _ in config.explain(load(THREE))}
    assert rows["data.views.1.scale"] == [0.2, 1.0] and rows["data.views.0.mask.strategy"] == "random"
    assert rows["data.views.2.same_crop_as"] == 1 and rows["data.views.2.mask.strategy"] == "none"
    assert all(meaning for _, _, meaning in config.explain(load(THREE)))


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["data.views.2.flip=true"],
            "data.views.2.flip: there is no data.views.2; data.num_views is 2, the places are",
        ),
        (["data.views.1.flop=true"], "data.views.1.flop: unknown key; did you mean data.views.1.flip?"),
        (["data.views.1.mask.keep_ration=1"], "did you mean data.views.1.mask.keep_ratio?"),
        (["data.views.1.mask=1"], "data.views.1.mask: a section, not a key; its keys: data.views.1.mask.strategy"),
        (["data.views.1=1"], "data.views.1: "),
        (["data.views.one.flip=true"], "data.views.one.flip: unknown key"),
        (["data.views.-1.flip=true"], "data.views.-1.flip: unknown key"),
        (["data.views.01.flip=true"], "data.views.01.flip: unknown key"),
        (["data.views=2"], "data.views: '2' does not fit; it takes a list of sections"),
        (["data.views=[1]"], "data.views.0: 1 is no section"),
        (["data.views=[{flop: 1}]"], "data.views.0.flop: unknown key; did you mean data.views.0.flip?"),
        (["data.views=[{flip: 3}]"], "data.views.0.flip: 3 does not fit; it takes true or false"),
        (["data.views=[{},{}]", "data.num_views=3"], "data.num_views: 3, but data.views lists 2"),
        (["data.views.1.same_crop_as=3"], "data.views.1.same_crop_as: 3 is no view before this one; the earlier ones"),
        (["data.views.1.same_crop_as=1"], "data.views.1.same_crop_as: 1 is no view before this one"),
        (["data.views.0.same_crop_as=0"], "data.views.0.same_crop_as: 0 is no view before this one; there is none"),
        (["data.views.1.same_crop_as=-1"], "data.views.1.same_crop_as: -1 is no view"),
        (["data.views.1.same_crop_as=0", "data.views.1.flip=true"], "data.views.1.flip: the crop is that of view 0"),
        (["data.views.1.scale=[0.5,1.5]"], "data.views.1.scale: [0.5, 1.5] is above 1"),
        (["data.views.1.scale=[1,0.5]"], "data.views.1.scale: [1.0, 0.5] is no pair"),
        (["data.views.1.scale=[0.5]"], "data.views.1.scale: [0.5] is no pair"),
        (["data.views.1.ratio=[0,1]"], "data.views.1.ratio: [0.0, 1.0] is no pair"),
        (["data.views.1.mask.keep_ratio=0"], "data.views.1.mask.keep_ratio: 0.0 is outside (0, 1]"),
        (["data.views.1.mask.strategy=randm"], "data.views.1.mask.strategy: 'randm' is none of"),
        (
            ["data.views.1.mask.unit=3"],
            "data.views.1.mask.unit: 3 does not divide the patch grid of 8 x 8; set it to 1, or another",
        ),
        (["data.views.1.mask.keep_ratio=0.001"], "data.views.1.mask.keep_ratio: 0.001 of "),
        (["data.views.1.mask.unit=8", "data.views.1.mask.keep_ratio=0.5"], "or a smaller data.views.1.mask.unit"),
        (["mask.schedule=linear", "mask.final_keep_ratio=0.001"], "mask.final_keep_ratio: 0.001 of "),
        (
            ["mask.strategy=disjoint", "mask.keep_ratio=0.6"],
            "mask.keep_ratio: 2 views of 39 units each, none in common",
        ),
        (
            [*DISJOINT, "data.views.0.mask.keep_ratio=0.6", "data.views.1.mask.keep_ratio=0.6"],
            "data.views.0.mask.keep_ratio: 2 views of 39 units each, none in common",
        ),
        (
            [*DISJOINT, "mask.schedule=linear", "mask.final_keep_ratio=0.6"],
            "mask.final_keep_ratio: 2 views of 39 units each, none in common",
        ),
        (
            [*DISJOINT, "mask.keep_ratio=0.25", "data.views.1.mask.keep_ratio=0.5"],
            "data.views.1.mask: views of mask.strategy=disjoint share one order; give them one keep_ratio, unit and",
        ),
        ([*DISJOINT, "data.views.1.mask.unit=2"], "data.views.1.mask: views of mask.strategy=disjoint share one order"),
        (
            ["mask.strategy=disjoint"],
            "data.views.1.same_crop_as: views of mask.strategy=disjoint are parts of one crop; set it to 0",
        ),
        (
            ["data.text_mask.strategy=block", "data.text_mask.tokens=4", "loss.text=plain"],
            "data.text_mask.strategy: nothing reads masked texts (loss.text=plain); leave one out",
        ),
        (["data.views.1.mask.schedule=linear"], "data.views.1.mask.final_keep_ratio: mask.schedule=linear needs it"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        load(*words)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("views: [{flop: 1}]", "data.views.0.flop: unknown key"),
        ("views: {x: {flip: true}}", "data.views.x: items are named by their place"),
        ("views: {7: {flip: true}}", "data.views.7.flip: there is no data.views.7"),
        ("views: [{scale: [2, 3]}]", "data.views.0.scale: [2.0, 3.0] is above 1"),
        ("num_views: 3, views: [{}, {}]", "data.num_views: 3, but data.views lists 2"),
        ("views: 3", "data.views: 3 does not fit"),
        ("views: [[flip]]", "data.views.0: ['flip'] is no section"),
    ],
)
def test_a_mistake_in_a_yaml_names_the_file(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"recipe: random2x-tiny\ndata: {{{text}}}\n")
    with pytest.raises(UserError) as error:
        config.load(str(file))
    assert said in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "schedule, ratios",
    [
        ("linear", [0.5, 0.4642857, 0.4285714, 0.3928571, 0.3571428, 0.3214285, 0.2857142, 0.25]),
        ("cosine", [0.5, 0.48762, 0.45295, 0.40283, 0.34716, 0.29704, 0.26237, 0.25]),
    ],
)
def test_a_schedule_has_eight_ratios_from_the_first_to_the_last(schedule: str, ratios: list[float]) -> None:
    words = [f"mask.schedule={schedule}", "mask.final_keep_ratio=0.25"]
    mask = load(*words).mask
    seen = [mask.at(step / 800).keep_ratio for step in range(801)]
    assert list(dict.fromkeys(seen)) == pytest.approx(ratios, abs=1e-4)
    assert seen[99] == seen[0] and seen[100] != seen[99] and mask.at(1.0) == mask.at(0.999)
    assert mask.at(0.3).at(0.9) == mask.at(0.3)  # which no longer changes


def test_a_constant_keep_ratio_is_the_same_mask_throughout() -> None:
    mask = load().mask
    assert mask.at(0.0) is mask and mask.at(1.0) is mask
    with pytest.raises(SettingsError, match="mask.final_keep_ratio: mask.schedule=constant keeps mask.keep_ratio"):
        load("mask.final_keep_ratio=0.3")


def test_views_with_different_schedules_go_together_when_they_keep_equally_many() -> None:
    loaded = load("data.views.1.mask.schedule=linear", "data.views.1.mask.final_keep_ratio=0.25")
    assert [views for views, _ in kept(loaded, 0.0)] == [(0, 1)]
    assert [views for views, _ in kept(loaded, 1.0)] == [(0,), (1,)]


def test_a_view_may_keep_its_ratio_where_the_others_have_a_schedule(tmp_path: Path) -> None:
    loaded = load("mask.schedule=linear", "mask.final_keep_ratio=0.25", "data.views.1.mask.schedule=constant")
    assert [[mask.at(share).keep_ratio for share in (0.0, 1.0)] for mask in method_of(loaded).masks] == [
        [0.5, 0.25],
        [0.5, 0.5],
    ]
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(loaded))
    assert config.load(str(file)) == loaded
    with pytest.raises(SettingsError, match=r"data.views.1.mask.final_keep_ratio: mask.schedule=constant keeps"):
        load("data.views.1.mask.schedule=constant", "data.views.1.mask.final_keep_ratio=0.25")


def test_disjoint_views_may_be_any_of_one_crop() -> None:
    """Another view between them, and one that repeats a repeated crop."""
    views = "data.views=[{mask: {strategy: none}}, {same_crop_as: 0}, {same_crop_as: 1}]"
    loaded = load("mask.strategy=disjoint", views)
    assert kept(loaded) == [((0,), ["none"]), ((1, 2), ["disjoint"])]
    load("mask.strategy=disjoint", "data.num_views=1")


def test_what_is_predicted_must_be_removed_from_when_the_objective_begins() -> None:
    mask = [f"data.views.1.mask.{word}" for word in ("keep_ratio=1", "schedule=linear", "final_keep_ratio=0.25")]
    with pytest.raises(UserError, match="loss.patches.weight: view 1 keeps every token: data.views.1.mask.keep_ratio"):
        load(*mask, recipe="maskclip-tiny")
    load(*mask, "loss.patches.start=0.5", recipe="maskclip-tiny")


def test_a_run_that_there_is_can_be_read_however_it_trained(tmp_path: Path) -> None:
    had = load("data.text_mask.strategy=block", "data.text_mask.tokens=4")
    had.loss.text, had.mask.strategy = "plain", "disjoint"
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(had))
    assert config.load_run(file).loss.text == "plain"
    with pytest.raises(UserError, match="same_crop_as"):
        config.load(str(file))


def test_lists_of_sections_are_found_by_their_type() -> None:
    assert configfile.item_kind(config.keys_and_types()["data.views"]) is config.ViewConfig
    assert configfile.item_kind(config.keys_and_types()["data.captions"]) is None


def test_the_card_of_an_export_says_each_view_s_mask() -> None:
    assert masks_in_words(load()) == "`mask.strategy=random` (keep ratio 0.5)"
    words = ["data.views.1.mask.strategy=none", "mask.schedule=linear", "mask.final_keep_ratio=0.75"]
    first, second = masks_in_words(load(*words)).split(", ")
    assert first == "`mask.strategy=random` (keep ratio 0.5 to 0.75) on view 1"
    assert second == "`mask.strategy=none` on view 2"


def test_the_page_s_yaml_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "views.md").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: random2x-tiny\n" + page.split("```yaml\n")[1].split("```")[0])
    assert kept(config.load(str(file))) == [((0,), ["random"]), ((1,), ["none"]), ((2,), ["random"])]
