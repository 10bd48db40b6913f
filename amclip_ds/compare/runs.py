"""Which runs a comparison has: each recipe with each seed, under one budget, on the same samples in the same order."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds import plain_yaml, run_files
from amclip_ds.checkpoint import drift
from amclip_ds.checkpoint.step_folders import list_steps
from amclip_ds.config import TrainConfig
from amclip_ds.errors import UserError
from amclip_ds.files import read_json, read_text
from amclip_ds.plan.work import TERA, mean_operations, work_of
from amclip_ds.record import read_verdict

PLAN = "compare-runs.json"
"""in OUT: the runs with their words, so that nothing of other settings is taken for theirs"""
OURS = ("run.out", "run.seed", "run.steps", "run.epochs")
# What decides which samples come in which order, and what a run is judged on.
EQUAL = (
    "data.train",
    "data.weights",
    "data.resampled",
    "data.open_shards",
    "data.shuffle_window",
    "data.max_skip_rate",
    "data.exclude",
    "batch.global_size",
    "eval.data",
)
# Free to differ where contents are compared, which nobody does with a run that is only read.
OF_RESULTS = (*EQUAL, "data.text_mask.table")
UNITS = ("steps", "samples", "seconds", "flops")
SHOWN = 4
"""differences that an error names"""
CURVE_POINTS = 10
"""evaluations of a run where the words name no eval.every_steps: accuracy at equal time is read between them"""


@dataclass(frozen=True)
class Budget:
    """What each run may spend: steps, samples, seconds of training (a step's time is measured first), or operations."""

    unit: str
    amount: float


@dataclass(frozen=True)
class Row:
    """One recipe: its name in the table, its settings with everything but seed, length and folder, and its cost."""

    name: str
    recipe: str
    config: TrainConfig
    tflop_per_step: float
    """planned: the mean over the run's steps, with every text as long as the context"""


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    row: Row
    seed: int
    steps: int
    folder: Path
    words: tuple[str, ...]
    """key=value words of `amclip train`"""


def read_budget(text: str) -> Budget:
    """Of `steps=900`, `samples=1e6`, `seconds=600` or `flops=1e15`. Raises UserError."""
    unit, sign, amount = text.partition("=")
    if unit not in UNITS or not sign or not re.fullmatch(r"[0-9]+(\.[0-9]*)?([eE]\+?[0-9]+)?", amount):
        raise UserError(f"--budget {text}: expected one of {', '.join(f'{name}=N' for name in UNITS)}")
    budget = Budget(unit, float(amount))
    if not 1 <= budget.amount < 1e30:
        raise UserError(f"--budget {text}: {amount} is outside [1, 1e30)")
    return budget


def row_name(recipe: str) -> str:
    """A recipe's name, or that of its yaml without folder and ending."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def read_rows(recipes: Sequence[str], overrides: Sequence[str], plugins: list[str], procs: int) -> list[Row]:
    """The recipes with the settings that all have. Raises UserError where they would not see the same data."""
    for word in overrides:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word}: compare sets it itself, by --out, --seeds and --budget")
    names = [row_name(recipe) for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{twice[0]}: given twice; what differs goes into a yaml of its own")
    rows = []
    for name, recipe in zip(names, recipes, strict=True):
        config = settings.load(recipe, [*overrides, "run.steps=1"], plugins)
        settings.plan_batch(config.batch, procs)
        rows.append(Row(name, recipe, config, mean_operations(work_of(config, procs)) * procs / TERA))
    for key in EQUAL:
        values = {row.name: attrgetter(key)(row.config) for row in rows}
        if len(set(map(repr, values.values()))) > 1:
            (first, one), (second, other) = _two_that_differ(values)
            raise UserError(f"{key}: {one} in {first}, {other} in {second}; give one for all: {key}=VALUE")
    if not rows[0].config.eval.data:
        raise UserError("eval.data: missing; what runs are compared by")
    return rows


def make_runs(rows: Sequence[Row], seeds: int, steps: dict[str, int], overrides: Sequence[str], out: Path) -> list[Run]:
    """The runs, seed by seed, so that a comparison that was stopped has whole rounds."""
    given = {word.partition("=")[0] for word in overrides}
    runs = []
    for seed in range(seeds):
        for row in rows:
            folder = out / f"{row.name}-seed{seed}"
            words = [*overrides, f"run.out={folder}", f"run.seed={seed}", f"run.steps={steps[row.name]}"]
            if "eval.every_steps" not in given:
                words.append(f"eval.every_steps={max(1, steps[row.name] // CURVE_POINTS)}")
            runs.append(Run(row, seed, steps[row.name], folder, tuple(words)))
    return runs


def steps_of(rows: Sequence[Row], budget: Budget, step_s: dict[str, float]) -> dict[str, int]:
    """Steps of each recipe under the budget. step_s: seconds of a step, for a budget of seconds. Raises UserError."""
    steps = {}
    for row in rows:
        cost = {
            "steps": 1.0,
            "samples": float(row.config.batch.global_size),
            "flops": row.tflop_per_step * TERA,
            "seconds": step_s.get(row.name, math.inf),
        }[budget.unit]
        steps[row.name] = int(budget.amount / cost)
        if steps[row.name] < 1:
            raise UserError(f"--budget {budget.unit}={budget.amount:g}: a step of {row.name} takes {cost:.3g}")
    return steps


def read_earlier(out: Path) -> dict[str, Any] | None:
    """The plan that an earlier call left in OUT; None where OUT is new or empty. Raises UserError where OUT holds other
    things and no plan."""
    # Listed first: tasks of an array that start together see each other's plan, or an empty folder.
    holds = out.exists() and any(not path.name.startswith(".") for path in out.iterdir())
    plan = read_plan(out)
    if plan is None and holds:
        raise UserError(f"--out {out}: holds other things and no comparison; name a new or an empty folder")
    return plan


def check_against_earlier(runs: Sequence[Run], out: Path, plan: dict[str, Any]) -> None:
    """Raises UserError where OUT has runs of other words or settings: they would be shown as these."""
    for run in runs:
        before = plan["runs"].get(run.folder.name)
        if before is not None and before["words"] != list(run.words):
            changed = sorted(set(before["words"]) ^ set(run.words))
            raise UserError(
                f"--out {out}: its run {run.folder.name} has other settings ({', '.join(changed[:SHOWN])}); name"
                f" another folder, or give the same words"
            )
        if _has_results(run.folder):
            recipe = "" if before is None else str(before.get("recipe", ""))
            check_settings(run.row, run.folder, "" if recipe in ("", run.row.recipe) else f"recipe {recipe}; ")


def check_settings(row: Row, folder: Path, whose: str = "") -> None:
    """Raises UserError where the run in a folder had other settings than the row, of those that decide its results. A
    key that a newer version has added had its default. whose: put before the differences."""
    file = folder / run_files.CONFIG
    if not file.exists():
        return
    saved = drift.flatten(read_text(file, plain_yaml.MAX_BYTES), str(file))
    present, defaults = (drift.flatten(settings.dump(config)) for config in (row.config, type(row.config)()))
    changes = [change for change in drift.compare(saved, present, defaults) if _decides(change)]
    if changes:
        more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise UserError(
            f"--out {folder.parent}: its run {folder.name} had other settings than {row.recipe} has now"
            f" ({whose}{'; '.join(map(str, changes[:SHOWN]))}{more}); name another folder, or give those settings again"
        )


def _has_results(folder: Path) -> bool:
    """Whether a run would be shown or resumed; one that failed before its first checkpoint begins anew."""
    verdict = read_verdict(folder)
    return (verdict is not None and verdict["code"] == 0) or bool(list_steps(folder / run_files.CHECKPOINTS))


def _decides(change: drift.Change) -> bool:
    """Whether a run's results depend on what has changed."""
    is_of_results = change.key in OF_RESULTS or drift.decides(change.key, change.saved, change.present)
    return change.key not in OURS and is_of_results


def read_plan(out: Path) -> dict[str, Any] | None:
    """What an earlier call left in OUT. Raises UserError for a file that is none of ours."""
    if not (out / PLAN).exists():
        return None
    plan = read_json(out / PLAN, dict)
    runs, step_s = plan.get("runs"), plan.get("step_s")
    are_runs = isinstance(runs, dict) and all(
        isinstance(run, dict) and isinstance(run.get("words"), list) for run in runs.values()
    )
    are_times = isinstance(step_s, dict) and all(
        type(value) is float and 0 < value < math.inf for value in step_s.values()
    )
    if not are_runs or not are_times:
        raise UserError(f"{out / PLAN}: not what `amclip compare` wrote")
    return plan


def _two_that_differ(values: dict[str, Any]) -> tuple[tuple[str, Any], tuple[str, Any]]:
    first = next(iter(values.items()))
    return first, next(item for item in values.items() if repr(item[1]) != repr(first[1]))
