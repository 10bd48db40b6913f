"""One row a step, weights, data set and task: what is there is not written again, what is missing is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from amclip_ds import cli
from amclip_ds.errors import UserError
from amclip_ds.evaluate import rows
from amclip_ds.evaluate.datasets import EvalSet, open_set
from amclip_ds.evaluate.source import locate, open_encoder
from tests.unit.evaluate.exports import write_export, write_run
from tests.unit.evaluate.test_encoder import write_set

TASK = "zeroshot_classification"
SETS = [EvalSet("cars", TASK, ()), EvalSet("pets", TASK, ())]


def row(step: int, weights: str, dataset: str) -> dict[str, Any]:
    return {"step": step, "weights": weights, "dataset": dataset, "task": TASK, "metrics": {"acc1": 0.5}}


def test_what_is_missing(tmp_path: Path) -> None:
    assert rows.missing(tmp_path, 3, SETS, ["student"]) == {"student": SETS}
    assert rows.append_new(tmp_path, [row(3, "student", "cars"), row(2, "student", "pets")]) == 2
    left = rows.missing(tmp_path, 3, SETS, ["student", "teacher"])
    assert left == {"student": SETS[1:], "teacher": SETS}, "another set, another step, other weights are no substitute"
    rows.append_new(tmp_path, [row(3, weights, data.name) for weights in ("student", "teacher") for data in SETS])
    assert rows.missing(tmp_path, 3, SETS, ["student", "teacher"]) == {}


def test_nothing_is_there_twice(tmp_path: Path) -> None:
    mine = [row(3, "student", "cars"), row(3, "teacher", "cars")]
    assert rows.append_new(tmp_path, mine[:1]) == 1
    assert rows.new(tmp_path, mine) == mine[1:]
    assert rows.append_new(tmp_path, mine) == 1
    written = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [(one["step"], one["weights"]) for one in written] == [(3, "student"), (3, "teacher")]


def test_one_set_by_two_names_is_evaluated_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named twice, by another spelling, or with `auto` beside the task that it becomes."""
    mine = [row(3, "student", "cars"), row(3, "student", "cars")]
    assert rows.new(tmp_path, mine) == mine[:1]
    data = write_set(tmp_path / "set")
    write_run(tmp_path / "run")
    words = ["eval", str(tmp_path / "run"), "--weights", "student", "--json", str(tmp_path / "n.json")]
    words += ["--data", str(data), "--data", str(data), "--data", f"{tmp_path}/run/../set"]
    assert cli.main([*words, "--task", "auto", "--task", TASK]) == 0
    assert "1 of 1 rows appended" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "n.json").read_text())) == 1


def test_weights_that_are_not_there_are_refused_before_a_set_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export of the student was evaluated, and its row called the student's."""
    write_export("open_clip", tmp_path / "export")
    write_run(tmp_path / "run")
    (tmp_path / "run" / "teacher.safetensors").unlink()
    for source in ("export", "run"):
        words = ["eval", str(tmp_path / source), "--data", str(tmp_path / "nowhere"), "--weights", "teacher"]
        assert cli.main(words) == 2
        assert f"{tmp_path / source}: holds no teacher; --weights student" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no teacher"):
        open_encoder(locate(tmp_path / "export"), "teacher", torch.device("cpu"))


def test_other_prompts_and_names_are_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twins: the set's own prompts given as a file, and prompts for a set that has none, are its own rows."""
    write_set(tmp_path / "set")
    write_run(tmp_path / "run")
    (tmp_path / "mine.txt").write_text("{c}\n")
    (tmp_path / "things.txt").write_text("".join(f"object {n}\n" for n in range(5)))
    name = open_set(str(tmp_path / "set")).name
    words = ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "set"), "--weights", "student"]

    def evaluated(*more: str) -> str:
        assert cli.main([*words, *more]) == 0
        (row,) = json.loads((tmp_path / "n.json").read_text())
        return row["dataset"] if "1 of 1 rows appended" in capsys.readouterr().out else "there already"

    words += ["--json", str(tmp_path / "n.json")]
    assert evaluated() == name
    assert evaluated("--templates", str(tmp_path / "mine.txt")) == f"{name} templates=mine.txt"
    assert evaluated("--templates", str(tmp_path / "mine.txt")) == "there already"
    both = evaluated("--templates", "openai-7", "--classnames", str(tmp_path / "things.txt"))
    assert both == f"{name} templates=openai-7 classnames=things.txt"
    shutil.copytree(tmp_path / "set" / "test", tmp_path / "set" / "val")
    assert evaluated("--split", "test") == "there already", "the usual split, by its name"
    assert evaluated("--split", "val") == f"{name} split=val"
    own = tmp_path / "set" / "zeroshot_classification_templates.txt"
    assert evaluated("--templates", str(own)) == "there already"
    own.unlink()
    open_set.cache_clear()
    assert open_set(str(tmp_path / "set"), templates="openai-7").asked == ()
