"""A comparison's runs and its table, from run folders as runs leave them."""

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from amclip_ds import cli, config
from amclip_ds.compare import runs as compared
from amclip_ds.compare.compare import Comparison, compare, plan_runs, show
from amclip_ds.compare.runs import (
    PLAN,
    Budget,
    Run,
    check_against_earlier,
    make_runs,
    read_budget,
    read_earlier,
    read_plan,
    read_rows,
    steps_of,
)
from amclip_ds.compare.table import Outcome, read_outcome, summarise
from amclip_ds.errors import UserError

WORDS = ["data.train=x.tar", "eval.data=y", "batch.global_size=64"]
RECIPES = ["clip-tiny", "aclip-tiny"]


def made_runs(out: Path, seeds: int = 3) -> list[Run]:
    rows = read_rows(RECIPES, WORDS, [], 1)
    return make_runs(rows, seeds, dict.fromkeys(RECIPES, 100), WORDS, out)


def write_run(run: Run, acc1: float, step_s: float, code: int = 0, torn: bool = False) -> None:
    """The records of a run that ended with this accuracy, having had half of it at half time."""
    run.folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 1.0, "step_s": step_s, "peak_memory_gib": 2.0} for step in range(10, 101, 10)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {
            "step": step,
            "weights": "student",
            "dataset": "scenes",
            "task": "zeroshot_classification",
            "metrics": {"acc1": acc1 * share},
            "main_metric": "acc1",
        }
        for step, share in ((50, 0.5), (100, 1.0))
    ]
    text = "".join(json.dumps(row) + "\n" for row in evaluations)
    (run.folder / "eval.jsonl").write_text(text + ('{"step": 100, "wei' if torn else ""))
    (run.folder / "exit.json").write_text(json.dumps({"code": code}))


def test_the_table_has_means_spreads_and_paired_differences(tmp_path: Path) -> None:
    runs = made_runs(tmp_path)
    accuracies = {
        ("clip-tiny", 0): 0.10,
        ("clip-tiny", 1): 0.20,
        ("clip-tiny", 2): 0.30,
        ("aclip-tiny", 0): 0.13,
        ("aclip-tiny", 1): 0.22,
        ("aclip-tiny", 2): 0.34,
    }
    for run in runs:
        write_run(run, accuracies[run.row.name, run.seed], 0.5 if run.row.name == "clip-tiny" else 1.0, torn=True)
    result = show(runs, "clip-tiny", tmp_path)
    clip, aclip = result["summary"]
    assert clip["metrics"]["acc1"]["mean"] == pytest.approx(0.20)
    assert clip["metrics"]["acc1"]["std"] == pytest.approx(0.10)
    # Seed by seed 0.03, 0.02, 0.04: the difference is far surer than the spread of either.
    assert aclip["difference"]["acc1"]["mean"] == pytest.approx(0.03)
    assert aclip["difference"]["acc1"]["std_error"] == pytest.approx(0.01 / math.sqrt(3))
    # clip ends after 50 s, when aclip is at step 50 of 100.
    assert clip["at_equal_time"]["seconds"] == aclip["at_equal_time"]["seconds"] == pytest.approx(50)
    assert clip["at_equal_time"]["mean"] == pytest.approx(0.20)
    assert aclip["at_equal_time"]["mean"] == pytest.approx((0.13 + 0.22 + 0.34) / 6)
    assert aclip["tflop_per_step"] > clip["tflop_per_step"] > 0
    row = json.loads((tmp_path / "compare.json").read_text())["rows"][0]
    assert row["recipe"] == "clip-tiny" and row["samples"] == 6400 and row["samples_per_s"] == 128
    assert row["peak_memory_gib"] == 2.0 and row["metrics"] == {"acc1": 0.1}
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert (tmp_path / "compare.txt").read_text().count("\n") == 3


def test_a_probe_is_no_zero_shot_accuracy(tmp_path: Path) -> None:
    """`amclip eval --task linear_probe` of a run records its accuracy under the same name."""
    run = made_runs(tmp_path, seeds=1)[0]
    write_run(run, 0.2, 0.5)
    before = read_outcome(run)
    for task in ("linear_probe", "knn"):
        row = {"step": 100, "weights": "student", "dataset": "scenes", "task": task, "metrics": {"acc1": 0.9}}
        with (run.folder / "eval.jsonl").open("a") as file:
            file.write(json.dumps(row | {"main_metric": "acc1"}) + "\n")
    assert read_outcome(run) == before and before.metrics == {"acc1": 0.2}


def test_the_table_and_the_picture_have_the_operations_that_were_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they change during the run, and where a resume has another number of ranks. Twins: a run that could
    not count has what was planned."""
    runs = made_runs(tmp_path, seeds=1)
    for run in runs:
        write_run(run, 0.2, 0.5)
    events = [{"event": "start", "world_size": 4}, {"event": "resumed", "world_size": 9}]
    rows = [{"step": 0, "attempt": 0, **event} for event in events]
    rows.append({"step": 40, "attempt": 1, "event": "start", "world_size": 2})
    (runs[1].folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # 2 TFLOP a step of all ranks until step 40, then 6
    metrics = [(10, 0, 1.0), (40, 0, 1.0), (60, 1, 6.0), (90, 1, 6.0)]
    written = [{"step": step, "attempt": attempt, "step_s": 0.5, "tflops": rate} for step, attempt, rate in metrics]
    (runs[1].folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    clip, aclip = (read_outcome(run) for run in runs)
    assert [aclip.spent(step) for step in (20, 50, 100)] == pytest.approx([40, 140, 440])
    as_planned = pytest.approx(runs[0].row.tflop_per_step)
    assert clip.tflop_per_step == as_planned
    drawn: list[list[float]] = []
    plot = Axes.plot

    def note(axis: Axes, spent: list[float], *values: object, **style: object) -> object:
        drawn.append(list(spent))
        return plot(axis, spent, *values, **style)

    monkeypatch.setattr(Axes, "plot", note)
    result = show(runs, "clip-tiny", tmp_path)
    assert [row["tflop_per_step"] for row in result["rows"]] == [as_planned, pytest.approx(4.4)]
    assert result["summary"][1]["tflop_per_step"] == pytest.approx(4.4)
    assert drawn[1] == pytest.approx([140, 440]), "at the evaluations of steps 50 and 100"


def test_time_is_that_of_the_steps_where_they_differ_over_a_run(tmp_path: Path) -> None:
    """An objective that begins at step 60 makes a step four times as long: the median of the rows would have 50 s."""
    clip, late = made_runs(tmp_path, seeds=1)
    write_run(clip, 0.2, 1.25)
    write_run(late, 0.4, 0.5)
    rows = [{"step": step, "loss": 1.0, "step_s": 0.5, "kept_tokens": 64} for step in range(10, 61, 10)]
    rows += [{"step": step, "loss": 1.0, "loss_patches": 1.0, "step_s": 2.0} for step in range(70, 101, 10)]
    rows[0]["step_s"] = rows[6]["step_s"] = 99.0  # what is compiled first, and what for the new loss
    (late.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = read_outcome(late)
    assert outcome.pace == [(60, 0.5), (100, 2.0)] and outcome.seconds() == 110.0 and outcome.step_s == 1.1
    assert outcome.at(30.0) == pytest.approx(0.24) and outcome.at(70.0) == pytest.approx(0.32)  # steps 60 and 80
    at_equal = [row["at_equal_time"] for row in show([clip, late], "clip-tiny", tmp_path)["summary"]]
    assert [row["seconds"] for row in at_equal] == [110.0, 110.0]
    assert [row["mean"] for row in at_equal] == pytest.approx([0.2 * 0.88, 0.4])


def test_a_run_that_failed_is_in_no_mean(tmp_path: Path) -> None:
    runs = made_runs(tmp_path, seeds=2)
    for run in runs[:3]:
        write_run(run, 0.2 if run.seed == 0 else 0.9, 0.5, code=0 if run.seed == 0 else 3)
    clip, aclip = summarise([read_outcome(run) for run in runs], "clip-tiny")
    assert (clip["seeds"], clip["not_run"], clip["metrics"]["acc1"]["mean"]) == (1, 1, 0.2)
    assert clip["metrics"]["acc1"]["std"] is None, "one seed has no spread"
    assert aclip["difference"]["acc1"]["values"] == [0.0]


def test_nothing_is_read_before_the_first_evaluation() -> None:
    run = Run(None, 0, 100, Path("x"), ())  # type: ignore[arg-type]
    outcome = Outcome(run, 0, [(100, 1.0)], None, {"acc1": 0.4}, [(50, 0.2), (100, 0.4)], "acc1")
    assert outcome.at(75) == pytest.approx(0.3)
    assert outcome.at(49) is None and outcome.at(1000) == 0.4


def test_budgets_in_other_units_are_steps(tmp_path: Path) -> None:
    rows = read_rows(RECIPES, WORDS, [], 1)
    assert steps_of(rows, read_budget("samples=6400"), {}) == dict.fromkeys(RECIPES, 100)
    by_flops = steps_of(rows, Budget("flops", 1e14), {})
    assert by_flops["clip-tiny"] > by_flops["aclip-tiny"]
    assert by_flops["clip-tiny"] == int(1e14 / (rows[0].tflop_per_step * 1e12))
    words = [*WORDS, "mask.strategy=random", "mask.schedule=linear"]
    falling, rising, most = (
        steps_of(read_rows(["clip-tiny"], [*words, *ratios], [], 1), Budget("flops", 1e14), {})["clip-tiny"]
        for ratios in (
            ["mask.keep_ratio=0.5", "mask.final_keep_ratio=0.25"],
            ["mask.keep_ratio=0.25", "mask.final_keep_ratio=0.5"],
            ["mask.keep_ratio=0.5", "mask.final_keep_ratio=0.5"],
        )
    )
    assert falling == rising > most
    assert steps_of(rows, read_budget("seconds=60"), {"clip-tiny": 0.5, "aclip-tiny": 2.0}) == {
        "clip-tiny": 120,
        "aclip-tiny": 30,
    }


@pytest.mark.parametrize("text", ["steps", "steps=", "steps=0", "steps=-1", "steps=nan", "steps=1e400", "epochs=3"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        read_budget(text)


def test_rows_of_other_data_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("recipe: aclip-tiny\ndata:\n  open_shards: 3\n")
    with pytest.raises(UserError, match=r"data.open_shards: \d+ in clip-tiny, 3 in other"):
        read_rows(["clip-tiny", str(other)], WORDS, [], 1)
    with pytest.raises(UserError, match="run.seed=1: compare sets it"):
        read_rows(RECIPES, [*WORDS, "run.seed=1"], [], 1)
    with pytest.raises(UserError, match="given twice"):
        read_rows(["clip-tiny", "clip-tiny"], WORDS, [], 1)
    with pytest.raises(UserError, match="eval.data"):
        read_rows(RECIPES, ["data.train=x.tar"], [], 1)


def test_runs_of_other_words_are_not_taken_for_these(tmp_path: Path) -> None:
    runs = made_runs(tmp_path)
    written = {"runs": {run.folder.name: {"words": list(run.words)} for run in runs}, "step_s": {}}
    (tmp_path / PLAN).write_text(json.dumps(written))
    plan = read_plan(tmp_path)
    assert plan is not None
    check_against_earlier(runs, tmp_path, plan)
    rows = read_rows(RECIPES, [*WORDS, "optim.lr=0.1"], [], 1)
    others = make_runs(rows, 3, dict.fromkeys(RECIPES, 100), [*WORDS, "optim.lr=0.1"], tmp_path)
    with pytest.raises(UserError, match=r"clip-tiny-seed0 has other settings \(optim.lr=0.1\)"):
        check_against_earlier(others, tmp_path, plan)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    assert read_earlier(tmp_path / "new") is None
    (tmp_path / "empty").mkdir()
    assert read_earlier(tmp_path / "empty") is None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds other things"):
        read_earlier(tmp_path / "full")


def planned(
    tmp_path: Path, yaml: str = "", folder: str = "rows", base: str = "random2x", unit: str = "steps"
) -> list[Run]:
    """The runs of a recipe of one's own, mine.yaml beside clip-tiny, as `amclip compare` plans them."""
    file = tmp_path / folder / "mine.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"recipe: {base}-tiny\n{yaml}")
    ask = Comparison(["clip-tiny", str(file)], WORDS, 1, Budget(unit, 100), "clip-tiny", tmp_path / "out", 1, [])
    return plan_runs(ask, lambda row, comparison: 1.0)


def write_settings(run: Run, **replaced: str) -> None:
    """config.yaml as the run leaves it, with some of its text replaced."""
    text = config.dump(config.load(run.row.recipe, run.words))
    for old, new in replaced.items():
        assert f"{old}: " in text
        text = re.sub(rf"(?m)^( *{old}:) .*\n", rf"\1 {new}\n" if new else "", text)
    (run.folder / "config.yaml").write_text(text)


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards that the words name are none."""
    monkeypatch.setattr("amclip_ds.compare.compare.preconditions.check", lambda config: None)


@pytest.mark.usefixtures("without_data")
def test_a_whole_run_is_not_shown_as_that_of_a_changed_recipe(tmp_path: Path) -> None:
    """Neither one of the same name, nor one that has been edited. Twins: what changes no result, a run that failed
    before its first checkpoint."""
    mine = planned(tmp_path)[1]
    write_run(mine, 0.5, 1.0)
    write_settings(mine)
    planned(tmp_path, "data: {workers: 2}\nengine: {deepspeed: zero1_fp32.json}\n")
    had = r"^--out \S+: its run mine-seed0 had other settings than \S+mine.yaml has now "
    for yaml, said in (
        ("optim: {lr: 0.5}\n", r"\(optim.lr: 0.0015 -> 0.5\); name another folder"),
        ("engine: {deepspeed: zero1_bf16.json}\n", r"\(engine.deepspeed: zero2_fp32.json -> zero1_bf16.json\)"),
        ("model: {init_from: weights.safetensors}\n", r"\(model.init_from: None -> weights.safetensors\)"),
    ):
        with pytest.raises(UserError, match=had + said):
            planned(tmp_path, yaml)
    with pytest.raises(UserError, match=had + r"\(recipe \S+rows/mine.yaml; loss.o2e_weight: .*; and 1 more\)"):
        planned(tmp_path, "optim: {lr: 0.5}\n", folder="others", base="aclip")
    planned(tmp_path, folder="moved")
    (mine.folder / "exit.json").write_text('{"code": 3}')
    planned(tmp_path, "optim: {lr: 0.5}\n")
    (mine.folder / "checkpoints" / "step_00000050").mkdir(parents=True)
    with pytest.raises(UserError, match="optim.lr"):
        planned(tmp_path, "optim: {lr: 0.5}\n")


@pytest.mark.usefixtures("without_data")
def test_a_key_that_an_older_version_did_not_have_was_at_its_default(tmp_path: Path) -> None:
    """Twin: where the recipe sets it to something else now, the run was of other settings."""
    mine = planned(tmp_path)[1]
    write_run(mine, 0.5, 1.0)
    write_settings(mine, layer_decay="")
    planned(tmp_path)
    with pytest.raises(UserError, match=r"optim.layer_decay: \S+ -> 0.5"):
        planned(tmp_path, "optim: {layer_decay: 0.5}\n")


@pytest.mark.usefixtures("without_data")
def test_a_plug_in_that_has_changed_is_another_recipe(tmp_path: Path) -> None:
    mine = planned(tmp_path)[1]
    write_run(mine, 0.5, 1.0)
    write_settings(mine)
    saved = mine.folder / "config.yaml"
    saved.write_text(saved.read_text() + "plugins:\n- mymask sha256:1234\n")
    with pytest.raises(UserError, match=r"plugins: \[mymask sha256:1234\] -> \(absent\)"):
        planned(tmp_path)


@pytest.mark.usefixtures("without_data")
def test_the_measured_time_of_a_step_is_not_a_changed_recipes(tmp_path: Path) -> None:
    mine = planned(tmp_path, unit="seconds")[1]
    timed = replace(mine, folder=tmp_path / "out" / "timing-mine")
    timed.folder.mkdir()
    write_settings(timed)
    planned(tmp_path, unit="seconds")
    with pytest.raises(UserError, match="its run timing-mine had other settings"):
        planned(tmp_path, "mask: {keep_ratio: 0.25}\n", unit="seconds")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"runs": {"a": 1}, "step_s": {}}', '{"runs": {}, "step_s": {"a": -1.0}}']
)
def test_a_plan_that_is_none_of_ours_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / PLAN).write_text(text)
    with pytest.raises(UserError, match=PLAN):
        read_plan(tmp_path)


ARGUMENTS = ["compare", *RECIPES, "data.train=x.tar", "eval.data=y", "batch.global_size=64"]


@pytest.fixture
def array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`amclip compare` with the arguments of an array of four, and some more: (exit code, printed, said)."""

    def run(*more: str) -> tuple[int, str, str]:
        code = cli.main([*ARGUMENTS, "--seeds", "2", "--budget", "steps=100", "--out", str(tmp_path / "out"), *more])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_task_of_an_array_has_the_words_of_its_run(
    array: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amclip_ds.preconditions.check", lambda config: None)
    found = [array("--task", str(task), "--tasks", "4")[1].split("\n") for task in range(4)]
    assert [words[0] for words in found] == ["clip-tiny", "aclip-tiny"] * 2
    folders = [next(word for word in words if word.startswith("run.out=")) for words in found]
    assert folders == [f"run.out={tmp_path}/out/{recipe}-seed{seed}" for seed in (0, 1) for recipe in RECIPES]
    code, _, said = array("--task", "0", "--tasks", "3")
    assert code == 2 and "--array: 3 tasks, and there are 4 runs: --array=0-3" in said
    code, _, said = array("--task", "0", "--tasks", "4", "--budget", "seconds=9")
    assert code == 2 and "an array times no steps first; give steps=, samples= or flops=" in said


def test_the_last_task_of_an_array_makes_the_table(
    array: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amclip_ds.preconditions.check", lambda config: None)
    array("--task", "0", "--tasks", "4")
    rows = read_rows(RECIPES, WORDS, [], 1)
    made = make_runs(rows, 2, dict.fromkeys(RECIPES, 100), WORDS, tmp_path / "out")
    for task, run in enumerate(made):
        write_run(run, 0.1 * (task + 1), 1.0)
        assert array("--task", str(task), "--tasks", "4")[1].strip() == "", "a whole run is not trained again"
        code, printed, _ = array("--ended", f"{task}=0")
        assert code == 0 and (tmp_path / "out" / "compare.txt").exists() == (task == 3)
    assert "clip-tiny" in printed and "aclip-tiny" in printed
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000
    assert array("--ended", "4")[0] == 2


def test_a_failed_task_leaves_its_run_out_of_the_table(
    array: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amclip_ds.preconditions.check", lambda config: None)
    array("--task", "0", "--tasks", "4")
    rows = read_rows(RECIPES, WORDS, [], 1)
    for run in make_runs(rows, 2, dict.fromkeys(RECIPES, 100), WORDS, tmp_path / "out")[:3]:
        write_run(run, 0.5, 1.0)
    codes = [array("--ended", f"{task}={code}")[0] for task, code in enumerate((0, 0, 0, 1))]
    assert codes == [0, 0, 0, 1]
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())["summary"]
    assert [row["seeds"] for row in summary] == [2, 1] and [row["not_run"] for row in summary] == [0, 1]


@pytest.mark.parametrize("moment", ["read_plan", "iterdir"])
def test_tasks_that_start_together_see_each_others_plan(
    moment: str, array: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another task notes the runs just after this one has read OUT's plan, or its names, for the first time."""
    monkeypatch.setattr("amclip_ds.preconditions.check", lambda config: None)
    of = {"read_plan": compared, "iterdir": Path}[moment]
    read = getattr(of, moment)
    begun: list[bool] = []

    def read_first(path: Path) -> object:
        found = list(read(path)) if moment == "iterdir" else read(path)
        if not begun and path == tmp_path / "out":
            begun.append(True)
            assert array("--task", "1", "--tasks", "4")[0] == 0
        return found

    monkeypatch.setattr(of, moment, read_first)
    (tmp_path / "out").mkdir()
    code, printed, said = array("--task", "0", "--tasks", "4")
    assert begun and (code, printed.split("\n")[0]) == (0, "clip-tiny"), said


PROGRAM = """#!/bin/sh
for word; do case $word in run.out=*) out=${word#run.out=} ;; esac; done
mkdir -p "$out"; trap : TERM
[ -z "$ASKED" ] || kill -TERM $ASKED
sleep 0.2; exit 0
"""


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_signal_in_a_run_that_is_at_its_end_stops_the_comparison(
    is_asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks end with 0 all the same: nothing is left to save. Twin: without a signal every run has its turn."""
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))
    monkeypatch.setattr("amclip_ds.compare.compare.preconditions.check", lambda config: None)  # of shards that are none
    monkeypatch.setenv("ASKED", str(os.getpid()) if is_asked else "")
    out = tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    _, code = compare(Comparison(RECIPES, WORDS, 1, Budget("steps", 10), "clip-tiny", out, 1, []))
    assert signal.getsignal(signal.SIGTERM) is before
    assert (code, (out / "aclip-tiny-seed0").exists()) == ((75, False) if is_asked else (0, True))


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_stopped_comparison_shows_what_is_whole(
    is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twin: where nothing is whole there is no table."""
    (tmp_path / "program").write_text(PROGRAM)
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))
    monkeypatch.setattr("amclip_ds.compare.compare.preconditions.check", lambda config: None)
    monkeypatch.setenv("ASKED", str(os.getpid()))
    out = tmp_path / "out"
    ask = Comparison(RECIPES, WORDS, 1, Budget("steps", 100), "clip-tiny", out, 1, [])
    runs = plan_runs(ask, lambda row, comparison: 1.0)
    if is_whole:
        write_run(runs[0], 0.5, 1.0)
    result, code = compare(ask)
    assert code == 75 and f"stopped in run {1 + is_whole} of 2; the same command resumes" in capsys.readouterr().out
    assert (out / "compare.json").exists() == is_whole and bool(result) == is_whole
    if is_whole:
        assert [row["seeds"] for row in json.loads((out / "compare.json").read_text())["summary"]] == [1, 0]
