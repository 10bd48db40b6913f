"""Runs a comparison: what is missing is trained, what was interrupted is resumed, what is whole is read."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amclip_ds import preconditions
from amclip_ds.arguments import plugin_words
from amclip_ds.compare.runs import (
    PLAN,
    Budget,
    Row,
    Run,
    check_against_earlier,
    check_settings,
    make_runs,
    read_earlier,
    read_rows,
    steps_of,
)
from amclip_ds.compare.table import Outcome, cells, draw, read_outcome, summarise
from amclip_ds.display import print_table, printable
from amclip_ds.errors import INTERRUPTED, MISTAKE, TO_REQUEUE, AmclipError, UserError
from amclip_ds.files import not_written, write_atomically
from amclip_ds.launch import run_ranks
from amclip_ds.masks import STAGES

TIMED_STEPS = 3 * STAGES
"""of each recipe, for a budget of seconds: a few at each number of tokens that a mask's schedule keeps"""
STOPPED = (MISTAKE, TO_REQUEUE, INTERRUPTED, 128 + 2, 128 + 15)  # nothing that the next run would do better


@dataclass(frozen=True)
class Comparison:
    """What is to be compared, from the command line. baseline: a recipe among them."""

    recipes: list[str]
    overrides: list[str]
    seeds: int
    budget: Budget
    baseline: str
    out: Path
    procs: int
    plugins: list[str]


def compare(ask: Comparison) -> tuple[dict[str, Any], int]:
    """Trains what is not there, writes OUT/compare.json and compare.txt after each run, and prints the table and draws
    compare.png at the end or when it is stopped.

    Returns what --json holds, and the exit code: that of a stop by a signal or a mistake; 1 where runs failed, which
    the table then lacks; else 0. Raises UserError.
    """
    runs = plan_runs(ask, _measure)
    failed: list[str] = []
    stopped = 0
    for number, run in enumerate(runs, 1):
        outcome = read_outcome(run)
        if outcome.is_whole:
            continue
        print(f"compare: run {number} of {len(runs)}: {run.row.name}, seed {run.seed}, {run.steps} steps", flush=True)
        code = _train(run.row.recipe, run.words, run.folder, ask)
        if code in STOPPED:
            stopped = code
            break
        if code:
            failed.append(f"{run.folder.name} (exit {code})")
        keep(runs, ask.baseline, ask.out)
    nothing = bool(stopped) and not any(read_outcome(run).is_whole for run in runs)
    result = {} if nothing else show(runs, ask.baseline, ask.out)
    if failed:
        print(printable(f"compare: {len(failed)} of {len(runs)} runs failed and are left out: {', '.join(failed)}"))
    if stopped:
        print(printable(f"compare: stopped in run {number} of {len(runs)}; the same command resumes"))
    return result, stopped or (1 if failed else 0)


def plan_runs(ask: Comparison, measure: Callable[[Row, Comparison], float]) -> list[Run]:
    """The runs, noted in OUT so that none of other settings is taken for theirs. measure: seconds of a recipe's step,
    for a budget of seconds. Raises UserError."""
    rows = read_rows(ask.recipes, ask.overrides, ask.plugins, ask.procs)
    names = [row.name for row in rows]
    if ask.baseline not in names:
        raise UserError(f"--baseline {ask.baseline}: not among the recipes: {', '.join(names)}")
    plan = read_earlier(ask.out)
    step_s = dict(plan["step_s"]) if plan else {}
    if plan is None:
        _check_first(rows, ask)
    if ask.budget.unit == "seconds":
        for row in rows:
            if row.name in step_s:
                check_settings(row, _timing_folder(row, ask))
                continue
            step_s[row.name] = measure(row, ask)
            _note(ask.out, plan or {"runs": {}}, step_s)
    runs = make_runs(rows, ask.seeds, steps_of(rows, ask.budget, step_s), ask.overrides, ask.out)
    check_against_earlier(runs, ask.out, plan or {"runs": {}})
    known = {run.folder.name: {"recipe": run.row.recipe, "words": list(run.words)} for run in runs}
    _note(ask.out, {"runs": (plan["runs"] if plan else {}) | known}, step_s)
    return runs


def keep(runs: Sequence[Run], baseline: str, out: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """Writes what there is as numbers. Returns it, and what --json holds."""
    outcomes: list[Outcome] = [read_outcome(run) for run in runs]
    summary = summarise(outcomes, baseline)
    result = {"rows": [outcome.json() for outcome in outcomes], "summary": summary}
    columns, lines = cells(summary)
    try:
        write_atomically(out / "compare.json", json.dumps(result, indent=1) + "\n")
        write_atomically(out / "compare.txt", "".join("\t".join(line) + "\n" for line in [columns, *lines]))
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    return outcomes, result


def show(runs: Sequence[Run], baseline: str, out: Path) -> dict[str, Any]:
    """Prints the table of what there is and writes the files. Returns what --json holds."""
    outcomes, result = keep(runs, baseline, out)
    columns, lines = cells(result["summary"])
    try:
        draw(outcomes, out / "compare.png")
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    print_table(columns, lines, title="mean ± standard deviation over seeds, in %; differences ± standard error")
    print(printable(f"{out}/compare.png: accuracy against compute; {out}/compare.json: every run"))
    return result


def _check_first(rows: Sequence[Row], ask: Comparison) -> None:
    """What every run would be refused for is found before the first one."""
    for row in rows:
        folder = ask.out / f"{row.name}-seed0"
        preconditions.check(replace(row.config, run=replace(row.config.run, out=str(folder))))


def _measure(row: Row, ask: Comparison) -> float:
    """Seconds of a step of this recipe here, with these processes. Raises AmclipError."""
    folder = _timing_folder(row, ask)
    print(f"compare: {row.name}: {TIMED_STEPS} steps, to know how many the seconds hold", flush=True)
    words = [*(word for word in ask.overrides if word.partition("=")[0] not in ("log.every_steps", "eval.every_steps"))]
    words += [f"run.out={folder}", f"run.steps={TIMED_STEPS}", "log.every_steps=1", "eval.every_steps=null"]
    code = _train(row.recipe, words, folder, ask)
    outcome = read_outcome(Run(row, 0, TIMED_STEPS, folder, ()))
    if code or not outcome.step_s:
        raise AmclipError(f"{row.name}: its step could not be timed: the run in {folder} ended with code {code}")
    return outcome.step_s


def _timing_folder(row: Row, ask: Comparison) -> Path:
    return ask.out / f"timing-{row.name}"


def _train(recipe: str, words: Sequence[str], folder: Path, ask: Comparison) -> int:
    command = [sys.executable, "-m", "amclip_ds", "train", recipe, *words, *plugin_words(ask.plugins)]
    heard: list[int] = []
    code = run_ranks(command, ask.procs, folder, listens=True, heard=heard)
    return TO_REQUEUE if heard and code == 0 else code  # a run that was at its end stops what comes after it


def _note(out: Path, plan: dict[str, Any], step_s: dict[str, float]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PLAN, json.dumps({"runs": plan["runs"], "step_s": step_s}, indent=1) + "\n")
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
