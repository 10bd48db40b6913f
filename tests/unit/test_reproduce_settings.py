"""`amclip reproduce`: which other settings mean other numbers."""

import json
from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.cli import main
from tests.unit.conftest import forget_plugins
from tests.unit.test_plugins import MASK, written


def settings_finding(run: Path, *words: str) -> tuple[int, str, str]:
    """(exit code, status, what was found) of a run that left its config.yaml alone."""
    code = main(["reproduce", str(run), *words, "--json", str(run / "found.json")])
    found = {row["name"]: row for row in json.loads((run / "found.json").read_text())["findings"]}
    return code, found["settings"]["status"], found["settings"]["found"]


def make_run(folder: Path, *words: str, recipe: str = "aclip-tiny", own: tuple[str, ...] = ()) -> Path:
    settings = config.load(recipe, ["data.train=x.tar", f"run.out={folder}", *words], own)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(settings))
    return folder


@pytest.mark.parametrize(
    "words, code, status, found",
    [
        ("optim.lr=3", 2, "fail", "other values here: optim.lr"),
        ("data.train=y.tar log.every_steps=7 run.seed=5", 2, "fail", "other values here: run.seed, "),
        ("data.train=y.tar log.every_steps=7", 0, "warn", "other values here: log.every_steps"),
        ("engine.deepspeed=zero1_bf16.json", 2, "fail", "other values here: engine.deepspeed"),
        ("engine.deepspeed=zero1_fp32.json", 0, "warn", "other values here: engine.deepspeed"),
        ("model.init_from=other", 2, "fail", "other values here: model.init_from"),
        ("data.exclude=elsewhere.txt", 0, "ok", "the same"),
        ("run.out=elsewhere", 0, "ok", "the same"),
    ],
)
def test_a_setting_that_changes_the_numbers_fails(
    words: str, code: int, status: str, found: str, tmp_path: Path
) -> None:
    reported = settings_finding(make_run(tmp_path / "run"), *words.split())
    assert reported[:2] == (code, status) and reported[2].startswith(found)


@pytest.mark.parametrize("recipe", ["aclip-tiny", "maskclip-tiny", "slip-tiny", "clip-tiny"])
def test_the_keys_that_a_run_does_not_know_are_counted(recipe: str, tmp_path: Path) -> None:
    """None of a run of this version, views that its file leaves to the recipe's defaults included."""
    run = make_run(tmp_path / "run", recipe=recipe)
    known = "the same; run.seed=0, compat="
    assert settings_finding(run)[2].startswith(known)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  log_sample_ids: false\n", ""))
    assert settings_finding(run)[2].startswith("the same (1 key is newer than the run, at its default); ")


def test_the_keys_of_a_plug_in_are_compared_too(tmp_path: Path) -> None:
    file = written(tmp_path, MASK)
    try:
        run = make_run(tmp_path / "run", "mask.strategy=mine", "mask.mine.slope=2", own=(file,))
        assert settings_finding(run, "--plugin", file)[:2] == (0, "ok")
        assert settings_finding(run, "mask.mine.slope=3", "--plugin", file)[:2] == (2, "fail")
    finally:
        forget_plugins()
