"""Masks and objectives of a user's own: which modules are loaded, what they may hold, the keys they bring."""

import hashlib
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from amclip_ds import config, masks, plugins
from amclip_ds.checkpoint import drift
from amclip_ds.errors import SettingsError, UserError
from amclip_ds.masks import MASKS
from tests.unit.conftest import forget_plugins

MASK = """
from dataclasses import dataclass

from amclip_ds.masks import Mask


@dataclass
class Options:
    slope: float = 1.0
    '''How steep.'''

    def __post_init__(self):
        if self.slope == 13:
            raise RuntimeError("thirteen")


def priority(inputs, options):
    return inputs.noise * options.slope


MASKS = {"mine": Mask(priority, frozenset({"noise"}), Options)}
"""
OBJECTIVE = """
from dataclasses import dataclass

from amclip_ds.objectives import Objective, Weighted


@dataclass
class Options(Weighted):
    temperature: float = 0.5


class Mine(Objective):
    Options = Options
    features = frozenset({"cls"})


OBJECTIVES = {"mine": Mine}
"""


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_a_mask_brings_its_name_and_its_typed_keys(tmp_path: Path) -> None:
    file = written(tmp_path, MASK)
    loaded = config.load("aclip-tiny", ["mask.strategy=mine", "mask.mine.slope=2"], [file, file])
    assert masks.options_of(loaded.mask).slope == 2.0
    assert loaded.plugins == [f"mine sha256:{hashlib.sha256(MASK.encode()).hexdigest()}"]
    assert ("mask.mine.slope", 2.0, "How steep.") in config.explain(loaded)
    with pytest.raises(SettingsError, match=r"mask.mine.slop: unknown key; did you mean mask.mine.slope\?"):
        config.load("aclip-tiny", ["mask.mine.slop=2"])
    with pytest.raises(SettingsError, match="mask.mine.slope: 'x' does not fit; it takes a number"):
        config.load("aclip-tiny", ["mask.mine.slope=x"])


def test_an_objective_brings_its_weight_which_is_0(tmp_path: Path) -> None:
    from amclip_ds.method import method_of

    file = written(tmp_path, OBJECTIVE)
    assert "mine" not in method_of(config.load("aclip-tiny", [], [file])).objectives
    with_weight = config.load("aclip-tiny", ["loss.mine.weight=0.5"], [file])
    assert method_of(with_weight).objectives["mine"].weight == 0.5
    with pytest.raises(SettingsError, match=r"loss.mine.wait: unknown key; did you mean loss.mine.weight\?"):
        config.load("aclip-tiny", ["loss.mine.wait=2"])
    with pytest.raises(SettingsError, match="loss.mine.weight: -1.0 must be 0 or more"):
        config.load("aclip-tiny", ["loss.mine.weight=-1"])


def test_settings_of_a_plugin_are_read_again_from_config_yaml(tmp_path: Path) -> None:
    file = written(tmp_path, MASK)
    first = config.load("aclip-tiny", ["mask.strategy=mine", "mask.mine.slope=2"], [file])
    copy = Path(written(tmp_path, config.dump(first), "config.yaml"))
    assert config.load(str(copy), [], [file]) == first


@pytest.mark.parametrize("words", [["mask.strategy=mine"], ["mask.mine.slope=2"], ["loss.mine.weight=1"]])
def test_without_the_plugin_the_command_says_to_add_it(words: list[str]) -> None:
    with pytest.raises(SettingsError, match="--plugin FILE.py"):
        config.load("aclip-tiny", words)


def test_no_yaml_loads_a_plugin(tmp_path: Path) -> None:
    """A stranger's config.yaml that names one: the command line must; whoever reads the run goes without."""
    file = written(tmp_path, MASK + f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    text = config.dump(config.load("aclip-tiny")).replace("strategy: attentive", "strategy: mine")
    copy = Path(written(tmp_path, text + f"plugins:\n- {file} sha256:0\n- mine\n", "config.yaml"))
    with pytest.raises(
        SettingsError, match=r"plugins: the run of these settings had the plug-in .*mine.py; add --plugin"
    ):
        config.load(str(copy))
    read = config.load_run(copy)
    assert read.mask.strategy == "none" and not read.plugins
    assert not (tmp_path / "ran").exists() and not plugins.LOADED
    for text in ("plugins: 7\n", "plugins: [{a: 1}]\n", "mask: {mine: {slope: 2}}\nplugins: [x]\n"):
        copy.write_text("run: {steps: 3}\n" + text)
        assert config.load_run(copy).run.steps == 3


def test_a_run_without_plugins_is_read_as_strictly_as_before(tmp_path: Path) -> None:
    copy = Path(written(tmp_path, "mask: {strategy: mine}\nrun: {steps: 3}\n", "config.yaml"))
    with pytest.raises(SettingsError, match="'mine' is none of"):
        config.load_run(copy)


def test_the_key_plugins_is_not_set_by_hand() -> None:
    with pytest.raises(SettingsError, match="plugins: written by the run"):
        config.load("aclip-tiny", ["plugins=[x]"])


def test_a_plugin_that_has_changed_is_drift_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    def text_of(content: str | None) -> str:
        forget_plugins()
        return config.dump(config.load("aclip-tiny", [], [written(tmp_path, content)] if content else []))

    first, changed, without = text_of(MASK), text_of(MASK + "\n# another\n"), text_of(None)
    same = drift.changes_between(first, first, {}, {}, "", "")
    assert not same
    with pytest.raises(UserError, match=r"plugins: \[mine sha256:.*checkpoint.allow_drift=\[plugins\]"):
        drift.refuse_or_allow(drift.changes_between(first, changed, {}, {}, "", ""), [])
    with pytest.raises(UserError, match=r"add --plugin: \[mine sha256:\w+\] is not loaded"):
        drift.refuse_or_allow(drift.changes_between(first, without, {}, {}, "", ""), [])
    assert "plugins" not in without


WRONG = {
    "nothing": ("x = 1\n", "has nothing in a top-level dict MASKS, TEXT_MASKS, OBJECTIVES"),
    "syntax": ("def f(:\n", r"its import raised SyntaxError: .*\(line 1\)"),
    "raises": ("x = 1\n1 / 0\n", r"its import raised ZeroDivisionError: division by zero \(line 2\)"),
    "exits": ("raise SystemExit(3)\n", "its import raised SystemExit"),
    "import": ("import not_there\n", "ModuleNotFoundError: No module named 'not_there'"),
    "no dict": ("MASKS = [1]\n", "MASKS is no dict whose keys are names"),
    "no mask": ("MASKS = {'mine': len}\n", r"MASKS\['mine'\] is a builtin_.*, not an amclip_ds"),
    "taken": (MASK.replace('"mine"', '"random"'), "there is a mask or a key mask.random already"),
    "a key": (MASK.replace('"mine"', '"unit"'), "there is a mask or a key mask.unit already"),
    "input": (MASK.replace('"noise"', '"sound"'), "a mask cannot have sound; there are noise"),
    "options": (MASK.replace("@dataclass\n", ""), "the options of MASKS.* are no dataclass"),
    "default": (MASK.replace("slope: float = 1.0", "slope: float"), "missing 1 required positional argument.*default"),
    "type": (MASK.replace("slope: float = 1.0", "slope: tuple = ()"), "slope is a <class 'tuple'>; bool, int"),
    "no objective": ("OBJECTIVES = {'mine': dict}\n", "is no subclass of amclip_ds.objectives.Objective"),
    "objective taken": (OBJECTIVE.replace('{"mine"', '{"byol"'), "there is an objective or a key loss.byol already"),
    "features": (OBJECTIVE.replace('"cls"', '"colours"'), "features asks for colours; there are cls, eot"),
    "a word": (OBJECTIVE.replace('frozenset({"cls"})', '"cls"'), "features is no set of names"),
    "no weight": (OBJECTIVE.replace("(Weighted)", ""), "Options needs a `weight` that is 0 by default"),
    "weight": (OBJECTIVE.replace("temperature: float = 0.5", "weight: float = 1.0"), "Options needs a `weight`"),
    "views": (OBJECTIVE + "Mine.views = ('first',)\n", "views are places in data.views"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plugin_is_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    text, reported = WRONG[case]
    before = dict(MASKS)
    with pytest.raises(UserError, match=rf"--plugin .*mine.py: .*{reported}") as caught:
        config.load("aclip-tiny", [], [written(tmp_path, text)])
    assert "\n" not in str(caught.value) and not plugins.LOADED and before == MASKS
    config.load("aclip-tiny", [], [written(tmp_path, MASK)])  # what was wrong can be loaded once it is right


def test_a_plugin_that_is_missing_is_named(tmp_path: Path) -> None:
    for source, reported in ((f"{tmp_path}/mine.py", "No such file"), ("no_such_module", "no module of that name")):
        with pytest.raises(UserError, match=f"--plugin {source}: {reported}"):
            config.load("aclip-tiny", [], [source])
    written(tmp_path, MASK), (tmp_path / "sub").mkdir()
    other = written(tmp_path / "sub", MASK)
    with pytest.raises(UserError, match="another plug-in is called mine"):
        config.load("aclip-tiny", [], [f"{tmp_path}/mine.py", other])


def test_options_that_raise_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="mask.mine: thirteen"):
        config.load("aclip-tiny", ["mask.mine.slope=13"], [written(tmp_path, MASK)])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with an entry point, as pip leaves it."""
    package = tmp_path / "site" / "their_masks"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from their_masks.one import MASKS\n")
    (package / "one.py").write_text(MASK)
    facts = tmp_path / "site" / "their_masks-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-masks\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[amclip_ds.plugins]\nmine = their_masks\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return str(package)


def test_an_installed_plugin_is_loaded_when_a_word_asks_for_its_name(installed: str, tmp_path: Path) -> None:
    config.load("aclip-tiny")
    assert "their_masks" not in sys.modules
    recipe = written(tmp_path, "recipe: aclip-tiny\nmask: {strategy: mine}\n", "own.yaml")
    with pytest.raises(SettingsError, match=r"the installed plug-in their_masks has it: --plugin mine \(in .*own.yaml"):
        config.load(recipe)
    assert "their_masks" not in sys.modules
    loaded = config.load("aclip-tiny", ["mask.strategy=mine"])
    assert loaded.plugins[0].startswith("their_masks sha256:") and loaded.mask.strategy == "mine"


@pytest.mark.parametrize("name", ["mine", "their_masks"])
def test_an_installed_plugin_is_named_by_its_entry_point_or_module(name: str, installed: str) -> None:
    before = config.load("aclip-tiny", [], [name]).plugins
    assert before[0].startswith("their_masks sha256:")
    assert config.load("aclip-tiny", [], ["mine", "their_masks"]).plugins == before


def test_a_package_is_known_by_all_its_files(installed: str) -> None:
    def identity() -> list[str]:
        forget_plugins()
        return config.load("aclip-tiny", [], ["their_masks"]).plugins

    first = identity()
    assert identity() == first
    Path(installed, "one.py").write_text(MASK + "# another\n")
    assert identity() != first


def test_a_mask_alone_is_loaded_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom amclip_ds import config\n"
        f"config.load('aclip-tiny', ['mask.strategy=mine'], [{written(tmp_path, MASK)!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


RAISES = """
import torch
from torch.utils.checkpoint import checkpoint

from amclip_ds.masks import Mask, units


def wrong(inputs, options):
    return torch.zeros(3) @ torch.zeros(4)


def unknown(inputs, options):
    return inputs.depth


def unnamed(inputs, options):
    return inputs.noise * 2


def below(inputs, options):
    return units.num_units(7, 2)


def memory(inputs, options):
    raise torch.OutOfMemoryError("CUDA out of memory")


MASKS = {name: Mask(globals()[name]) for name in ("wrong", "unknown", "unnamed", "below", "memory")}
"""


@pytest.mark.parametrize(
    ("mask", "reported"),
    [
        ("wrong", r"plug-in mine: wrong raised RuntimeError: .*line 9\); fix it there"),
        ("unknown", "unknown raised AttributeError: 'MaskInputs' object has no attribute 'depth'"),
        ("unnamed", r"unnamed raised TypeError: .*NoneType.*a field is None unless the mask's `needs`"),
    ],
)
def test_what_a_plugin_raises_is_one_line(mask: str, reported: str, tmp_path: Path) -> None:
    plugins.load([written(tmp_path, RAISES)])
    inputs = masks.MaskInputs(4, 1, 1)
    with pytest.raises(UserError, match=reported) as caught, plugins.blamed():
        MASKS[mask].priority(inputs, None)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(("mask", "kind"), [("below", "ValueError"), ("memory", "OutOfMemoryError")])
def test_what_is_raised_below_a_plugin_or_by_the_machine_is_not_its_fault(mask: str, kind: str, tmp_path: Path) -> None:
    """A lost rank inside a collective must not look like the user's mistake: code 2 is not requeued."""
    plugins.load([written(tmp_path, RAISES)])
    with pytest.raises(Exception) as caught, plugins.blamed():
        MASKS[mask].priority(masks.MaskInputs(4, 1, 1), None)
    assert caught.type.__name__ == kind
    with pytest.raises(ZeroDivisionError), plugins.blamed():
        print(1 / 0)


def names_of_masks(epoch: int, start: int, stop: int) -> tuple[list[str], list[str]]:
    """What a loader worker makes here: the masks it has, and its plug-ins' identities."""
    return sorted(MASKS), plugins.identities()


def test_loader_workers_load_what_the_ranks_have_read(tmp_path: Path) -> None:
    """Also one that starts after the file has changed. Twin: a worker that is reported nothing has ours alone."""
    from itertools import repeat

    from amclip_ds.data.workers import Workers

    file = Path(written(tmp_path, MASK))
    plugins.load([str(file)])
    reported = partial(plugins.again, list(plugins.LOADED.values()))
    file.write_text("raise SystemExit('edited')\n")
    for prepare, has_it in ((reported, True), (None, False)):
        workers = Workers(
            names_of_masks, repeat((0, 0, 1)), number=1, ahead=1, timeout_s=120, died=print, prepare=prepare
        )
        try:
            names, identities = workers.next()
        finally:
            workers.close()
        assert ("mine" in names) == has_it and identities == (plugins.identities() if has_it else [])


def test_an_objective_that_reads_a_view_that_there_is_not(tmp_path: Path) -> None:
    file = written(tmp_path, OBJECTIVE + "Mine.views = (0, 2)\n")
    words = ["loss.mine.weight=1"]
    with pytest.raises(SettingsError, match="loss.mine.weight: this objective reads the views 0, 2 of data.views"):
        config.load("aclip-tiny", words, [file])
    config.load("aclip-tiny", [*words, "data.num_views=3", "loss.o2o_weight=0"])
    config.load("aclip-tiny")


TEXT_MASK = """
from amclip_ds.masks.text import TextMask


def draw(random, n):
    return random.random()


def last(words, drawn, budget, options):
    return [one for _, ids in words for one in ids][-budget:]


def strange(words, drawn, budget, options):
    return [7] * budget


def pairs(words, drawn, budget, options):
    return words[-1:]


def raises(words, drawn, budget, options):
    return words[99]


TEXT_MASKS = {one.__name__: TextMask(draw, one) for one in (last, strange, pairs, raises)}
"""


def test_a_text_mask_of_ones_own(tmp_path: Path) -> None:
    import numpy as np

    from amclip_ds.masks import text

    before = dict(text.TEXT_MASKS)
    try:
        words = ["data.text_mask.strategy=last", "data.text_mask.tokens=4"]
        with pytest.raises(SettingsError, match="data.text_mask.strategy: 'last' is none of none, .*--plugin FILE.py"):
            config.load("aclip-tiny", words)
        loaded = config.load("aclip-tiny", words, [written(tmp_path, TEXT_MASK)]).data.text_mask
        caption = [("a", [1]), ("red", [2, 3]), ("dog", [4])]
        random = np.random.default_rng(0)
        assert text.masked(loaded, loaded, caption, random) == [3, 4]
        for name, reported in (
            ("strange", r"gave \[7, 7\]; it picks of"),
            ("raises", "raised IndexError: list index"),
            ("pairs", r"gave \[\('dog', \[4\]\)\]; it picks of"),
        ):
            with pytest.raises(UserError, match=f"text mask mine.{name} {reported}"):
                text.masked(text.TextMaskConfig(name, 4), None, caption, random)
        copy = Path(written(tmp_path, config.dump(config.load("aclip-tiny", words)), "config.yaml"))
        text.TEXT_MASKS.pop("last")
        assert config.load_run(copy).data.text_mask.strategy == "none"
    finally:
        text.TEXT_MASKS.clear()
        text.TEXT_MASKS.update(before)
