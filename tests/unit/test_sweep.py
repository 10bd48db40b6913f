"""A sweep's overrides and its table."""

import json
from pathlib import Path

import pytest

from amclip_ds import config, sweep
from amclip_ds.errors import UserError


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    path = written(tmp_path, "grid:\n  optim.lr: [1.0e-3, 2.0e-3]\n  mask.unit: [1, 2]\n  eval.data: null\n")
    runs = [sweep.overrides_of(path, index) for index in range(4)]
    assert runs[0] == ["optim.lr=0.001", "mask.unit=1", "eval.data=null"] and len({tuple(run) for run in runs}) == 4


def test_a_list_is_taken_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, "- {optim.lr: 1.0e-3}\n- {optim.lr: 2.0e-3, run.deterministic: true}\n")
    assert sweep.overrides_of(path, 1) == ["optim.lr=0.002", "run.deterministic=true"]


@pytest.mark.parametrize("text", ["", "a: 1", "grid: 3", "[1, 2]", "{"])
def test_what_is_no_sweep_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sweep"):
        sweep.read_sweep(written(tmp_path, text))


@pytest.mark.parametrize(
    "text, said",
    [
        ('- {data.train: "/a.tar\\nrun.seed=5"}', "a line end or control character"),
        ('- {run.out: "a\\tb"}', "a line end or control character"),
        ('- {"run.seed=1\\nrun.out": 2}', "a line end or control character"),
        ("- {run.out: $HOME/x}", "which only a command line may have"),
        ("- {optim.lrr: 1}", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("- {optim.lr: fast}", "optim.lr: 'fast' does not fit"),
        ("- {optim: {lr: 1}}", "optim: a section, not a key"),
        ("- {learning_rate: 1}", "did you mean optim.lr?"),
        ("grid: {optim.betas: [[0.9, x]]}", "optim.betas: 'x' does not fit"),
    ],
)
def test_a_value_that_is_no_one_word_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        sweep.overrides_of(written(tmp_path, text), 0)
    assert said in str(error.value) and "run 0" in str(error.value) and "\n" not in str(error.value)


def test_spaces_quotes_commas_and_equals_reach_the_run(tmp_path: Path) -> None:
    """The twin; as sweep.sbatch takes them, a line each."""
    path = written(tmp_path, "- {data.train: \"/my 'data',a=b/{0..1}.tar\", data.captions: ['{a}. {b}', txt]}")
    words = "\n".join(sweep.overrides_of(path, 0)).split("\n")
    loaded = config.load("aclip-tiny", words)
    assert loaded.data.train == "/my 'data',a=b/{0..1}.tar" and loaded.data.captions == ["{a}. {b}", "txt"]


def test_an_array_larger_than_the_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--array=0-0"):
        sweep.overrides_of(written(tmp_path, "- {optim.lr: 1}"), 1)


def test_the_table_is_written_by_the_last_run(tmp_path: Path) -> None:
    path, out = written(tmp_path, "- {optim.lr: 1}\n- {optim.lr: 2}\n"), tmp_path / "out"
    for index in range(2):
        (out / str(index)).mkdir(parents=True)
        (out / str(index) / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 1.5 + index}) + "\n")
    row = {
        "step": 7,
        "weights": "student",
        "dataset": "scenes",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.25},
    }
    (out / "0" / "eval.jsonl").write_text(json.dumps(row) + "\n")
    assert not sweep.finish(path, out, 1, 3) and not (out / "sweep.txt").exists()
    assert sweep.finish(path, out, 0, 0)
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["code"] for row in rows] == [0, 3] and rows[0]["student scenes acc1"] == 0.25
    lines = (out / "sweep.txt").read_text().splitlines()
    assert lines[0].split()[:3] == ["run", "optim.lr", "code"] and lines[2].split()[2] == "3"


def test_lines_that_cannot_be_read_are_counted_in_the_table(tmp_path: Path) -> None:
    path, out = written(tmp_path, "- {optim.lr: 1}\n- {optim.lr: 2}\n"), tmp_path / "out"
    for index, torn in enumerate(('{"step": 3, "lo\n', "")):
        (out / str(index)).mkdir(parents=True)
        (out / str(index) / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 1.5}) + "\n" + torn)
        (out / str(index) / "eval.jsonl").write_text(torn * 2)
    rows = sweep.table(path, out)
    assert [row.get("unreadable lines") for row in rows] == [3, None] and [row["step"] for row in rows] == [7, 7]
    assert "unreadable lines" in sweep.render(rows) and "unreadable" not in sweep.render(rows[1:])


def test_the_table_has_the_newest_zero_shot_accuracy(tmp_path: Path) -> None:
    """Not that of an older checkpoint that was evaluated later, nor of a probe."""
    path, out = written(tmp_path, "- {optim.lr: 1}\n"), tmp_path / "out"
    (out / "0").mkdir(parents=True)
    zero_shot = "zeroshot_classification"
    for step, task, value in ((20, zero_shot, 0.4), (10, zero_shot, 0.3), (20, "knn", 1)):
        row = {"step": step, "weights": "student", "dataset": "pets", "task": task, "metrics": {"acc1": value}}
        with (out / "0" / "eval.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert sweep.table(path, out)[0]["student pets acc1"] == 0.4


def test_keys_of_a_plugin_are_swept_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As sweep.sbatch asks; without the plug-in the key is unknown."""
    (tmp_path / "swept_mask.py").write_text(
        "from dataclasses import dataclass\nfrom amclip_ds.masks import Mask\n"
        "@dataclass\nclass Options:\n    slope: float = 1.0\n"
        "MASKS = {'swept': Mask(lambda inputs, options: inputs.noise, frozenset({'noise'}), Options)}\n"
    )
    path = written(tmp_path, "grid: {mask.strategy: swept, mask.swept.slope: [1, 2]}\n")
    assert sweep.main(["overrides", str(path), "1"]) == 2
    assert "mask.swept.slope: unknown key" in capsys.readouterr().out
    assert sweep.main(["overrides", str(path), "1", "--plugin", str(tmp_path / "swept_mask.py")]) == 0
    assert capsys.readouterr().out.split() == ["mask.strategy=swept", "mask.swept.slope=2"]
