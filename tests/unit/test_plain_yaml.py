"""Yaml is plain values: nothing in it is resolved, called, or unfolds without bound; each refusal is one line."""

import json
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from amclip_ds import config as settings
from amclip_ds import configfile, plain_yaml, sweep
from amclip_ds.checkpoint import drift
from amclip_ds.errors import UserError

LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 4000))
REFUSED = {
    "lists that unfold": (LISTS, "unfolded"),
    "merges that unfold": (MERGES, "unfolded"),
    "a chain of aliases": (CHAIN, "unfolded"),
    "an alias of itself": ("a: &a {b: *a}", "holds itself"),
    "depth": ("[" * 100_000, "deeper than"),
    "many values": ("- 1\n" * 30_000, "more than"),
    "size": ("# " + "x" * (300 << 10), "more than"),
    "a tag of Python": ("a: !!python/object/apply:os.system [touch /tmp/x]", "tag"),
    "a tag of ours": ("a: !secret b", "tag"),
    "a tag of bytes": ("a: !!binary aGVsbG8=", "tag"),
    "a set": ("a: !!set {b, c}", "tag"),
    "the environment": ("run: {out: '${oc.env:HOME}'}", r"run\.out: '\$\{oc.env:HOME\}'"),
    "another key": ("run: {out: '${run.seed}'}", r"run\.out"),
    "a variable in a list": ("optim: {betas: [0.9, '${x}']}", r"optim\.betas"),
    "a variable as a key": ("run: {'${x}': 1}", r"\$\{x\}"),
    "OmegaConf's missing value": ("run: {out: '???'}", r"run\.out"),
    "a key twice": ("run: {seed: 1, out: a, seed: 2}", "'seed' is given twice"),
    "a key that is a list": ("? [1, 2]\n: 3", "not a text"),
    "a number of 5,000 digits": ("run: {seed: " + "1" * 5000 + "}", "digits"),
    "two documents": ("a: 1\n--- \nb: 2", "another document"),
    "NUL": ("a: \x00", "not allowed"),
    "bytes": (b"a: \xff\xfe", "UTF-8"),
}


@pytest.fixture(params=REFUSED)
def refused(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    content, why = REFUSED[request.param]
    file = tmp_path / "foreign.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file, why


def test_it_is_one_line_within_seconds(refused: tuple[Path, str]) -> None:
    """A recipe and a sweep, which are read by two commands. Processor time: other tests run beside."""
    file, why = refused
    for read in (lambda: settings.load(str(file)), lambda: sweep.read_sweep(file)):
        began = time.process_time()
        with pytest.raises(UserError, match=why) as caught:
            read()
        assert "\n" not in str(caught.value) and "foreign.yaml" in str(caught.value)
        assert time.process_time() - began < 3.0  # 0.4 idle; beside others twice that and more was seen


@pytest.mark.parametrize("name", ["lists that unfold", "the environment", "a tag of ours", "depth", "a key twice"])
def test_a_checkpoints_config_alike(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name][1]) as caught:
        drift.flatten(REFUSED[name][0])
    assert "\n" not in str(caught.value)


def test_the_environment_reaches_no_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By yaml or by a word of the command that no shell has filled in; `$VAR` in a word is filled in once."""
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("TRAP", "${oc.env:SECRET}")
    monkeypatch.setenv("PLACE", "/data")
    length = ["run.steps=1"]
    for word in (
        "run.out=${oc.env:SECRET}",
        "run.out=$TRAP",
        "run.seed=${oc.env:SECRET}",
        "optim.betas=[0.9,${x}]",
        "run.out=${.seed}",
        "run.out=???",
    ):
        with pytest.raises(UserError) as caught:
            settings.load("aclip-tiny", [*length, word])
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value), word
    assert settings.load("aclip-tiny", ["run.out=$PLACE/run"]).run.out == "/data/run"
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: aclip-tiny\nrun: {out: $PLACE/run}\n")
    assert settings.load(str(file)).run.out == "$PLACE/run"


@pytest.mark.parametrize(
    "text",
    ["${oc.env:SECRET}", "a${oc.env:SECRET}b", "\\${oc.env:SECRET}", "$${oc.env:SECRET}", "${run.seed}", "${", "???"],
)
def test_omegaconf_sees_no_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill in what reached it; whichever key takes a text or a list refuses one, and so do merge and dump."""
    monkeypatch.setenv("SECRET", "hunter2")
    filled_in = OmegaConf.to_object(OmegaConf.create({"key": "${oc.env:SECRET}"}))
    assert filled_in == {"key": "hunter2"}
    words = []
    for key, hint in settings.keys_and_types().items():
        words += [f"{key}={text}"] if "str" in str(hint) else []
        words += [f"{key}=[{text}]", f"{key}=['{text}']"] if "list" in str(hint) else []
    assert len(words) > 30
    for word in words:
        with pytest.raises(UserError) as caught:
            settings.load("aclip-tiny", ["run.steps=1", word])
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value), word
    with pytest.raises(UserError, match="is not read here"):
        configfile.merge(settings.TrainConfig, [{"run.out": text}], {})
    changed = settings.load("aclip-tiny", ["run.steps=1"])
    changed.data.captions = [text]
    with pytest.raises(UserError, match="captions"):
        settings.dump(changed)


def test_a_files_name_is_no_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """run.out defaults to it."""
    monkeypatch.setenv("SECRET", "hunter2")
    file = tmp_path / "${oc.env:SECRET}.yaml"
    file.write_text("recipe: aclip-tiny\n")
    with pytest.raises(UserError, match=r"run\.out") as caught:
        settings.load(str(file))
    assert "hunter2" not in str(caught.value)
    assert settings.load(str(file), ["run.out=here"]).run.out == "here"


@pytest.mark.parametrize("base", ["mine.yaml", "/etc/other.yaml", "[a]", "5", "../../../../tmp/other-tiny"])
def test_a_base_is_a_recipes_name(base: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"recipe: {base}\n")
    with pytest.raises(UserError, match="recipe"):
        settings.load(str(file))


def test_what_people_write_is_read(tmp_path: Path) -> None:
    """The twin: anchors, merges, dates, exponents, and what we write ourselves."""
    text = "base: &base {lr: 1e-3, name: lamb}\noptim: {<<: *base, name: adamw}\nday: 2026-01-02\nsize: [1, 2.5, null]"
    assert plain_yaml.parse(text, "here") == {
        "base": {"lr": 0.001, "name": "lamb"},
        "optim": {"lr": 0.001, "name": "adamw"},
        "day": "2026-01-02",
        "size": [1, 2.5, None],
    }
    for recipe in ("aclip-vitb16", "flip-tiny"):
        written = settings.dump(settings.load(recipe))
        assert plain_yaml.parse(written, "here") == yaml.safe_load(written)
    assert plain_yaml.parse("", "here") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5", 5),
        ("true", True),
        ("null", None),
        ("[1e-3, 2]", [0.001, 2]),
        ("10:00:00", 36000),
        (".inf", float("inf")),
    ],
)
def test_a_value_as_it_is_written(text: str, value: object) -> None:
    assert plain_yaml.parse(text, "value") == value


def test_a_grid_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"grid": {f"k{n}": list(range(100)) for n in range(8)}}))
    with pytest.raises(UserError, match="combinations"):
        sweep.read_sweep(file)
