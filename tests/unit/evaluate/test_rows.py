"""One row a step, weights, data set and task: what is there is not written again, what is missing is found."""

import json
from pathlib import Path
from typing import Any

from amclip_ds.evaluate import rows
from amclip_ds.evaluate.datasets import EvalSet

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
