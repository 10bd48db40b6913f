"""What the runs of a comparison came to: a row a run, a summary a recipe, a picture."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds import run_files
from amclip_ds.compare.runs import Run
from amclip_ds.jsonl import is_number, read_lines
from amclip_ds.plots import pyplot
from amclip_ds.record import read_verdict
from amclip_ds.record.timeline import world_sizes

WARM_SHARE = 0.1  # of a run's first rows: the clock has not settled


@dataclass(frozen=True)
class Outcome:
    """One run as it ended."""

    run: Run
    code: int | None
    pace: Sequence[tuple[int, float]]
    """(last step, seconds of a step) of each part of the run whose steps do the same; none where it has no rows yet"""
    peak_memory_gib: float | None
    metrics: dict[str, float]
    """by name, of the last evaluation; the student's are bare, other weights and further sets are named before"""
    curve: list[tuple[int, float]]
    """(step, main metric of the student)"""
    main: str
    costs: Sequence[tuple[int, float]] = ()
    """(step, TFLOP of a step on all ranks, as the run counted it) of its rows; none where it could not count"""

    @property
    def is_whole(self) -> bool:
        return self.code == 0 and bool(self.metrics)

    @property
    def tflop_per_step(self) -> float:
        """On all ranks, the mean over the run's steps; planned where the run has counted none."""
        return self.spent(self.run.steps) / self.run.steps

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, the mean over the run; None where the run has no rows yet."""
        if len(self.pace) < 2:
            return self.pace[0][1] if self.pace else None
        return self.seconds() / self.run.steps

    def seconds(self) -> float:
        """Of training; 0 where the run has no rows yet."""
        return _summed(self.pace, self.run.steps, 0.0)

    def spent(self, steps: int) -> float:
        """TFLOP of the first steps on all ranks."""
        return _summed(self.costs, steps, self.run.row.tflop_per_step)

    def json(self) -> dict[str, Any]:
        """A row of --json."""
        size = self.run.row.config.batch.global_size
        return {
            "recipe": self.run.row.name,
            "seed": self.run.seed,
            "steps": self.run.steps,
            "samples": self.run.steps * size,
            "step_s": self.step_s,
            "samples_per_s": None if self.step_s is None else size / self.step_s,
            "peak_memory_gib": self.peak_memory_gib,
            "tflop_per_step": self.tflop_per_step,
            "code": self.code,
            "metrics": self.metrics,
            "run": str(self.run.folder),
        }

    def at(self, seconds: float) -> float | None:
        """The main metric after so many seconds of training, between two evaluations in proportion; None before the
        first one. The learning rate has then not come to its end, as it has in a run of that length."""
        if not self.pace:
            return None
        step = _steps_in(self.pace, seconds) * (1 + 1e-9)
        for (left, low), (right, high) in zip(self.curve, self.curve[1:]):
            if left <= step <= right:
                return low + (high - low) * (step - left) / (right - left)
        return self.curve[-1][1] if self.curve and step >= self.curve[-1][0] else None


def read_outcome(run: Run) -> Outcome:
    """A run's records. Lines that cannot be read are left out, as everywhere (amclip report counts them)."""
    verdict = read_verdict(run.folder)
    rows = _rows(run.folder / run_files.METRICS, run_files.STEP)
    peaks = [row["peak_memory_gib"] for row in rows if is_number(row.get("peak_memory_gib"))]
    evaluations = _rows(run.folder / run_files.EVALUATIONS, run_files.EVALUATION)
    evaluations = [row for row in evaluations if row["step"] <= run.steps and row["task"] not in run_files.PROBES]
    sets = list(dict.fromkeys(row["dataset"] for row in evaluations))
    metrics: dict[str, float] = {}
    for row in evaluations:
        if row["step"] == run.steps:
            place = "" if row["dataset"] == sets[0] else f"{row['dataset']} "
            place += "" if row["weights"] == "student" else f"{row['weights']}_"
            metrics |= {place + name: value for name, value in row["metrics"].items() if is_number(value)}
    curve, main = _curve(evaluations, sets)
    return Outcome(
        run,
        verdict["code"] if verdict else None,
        _pace(rows),
        max(peaks) if peaks else None,
        metrics,
        curve,
        main,
        _costs(run.folder, rows),
    )


def _pace(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(last step, seconds of a step) of each part of a run: a median of its rows. A part ends where the views keep
    other numbers of tokens, or the loss has other terms (loss.NAME.start): a step then takes another time."""
    cold, found = math.ceil(len(rows) * WARM_SHARE), list[tuple[int, float]]()
    timed = [(place, row) for place, row in enumerate(rows) if is_number(row.get("step_s"))]
    for _, part in itertools.groupby(timed, lambda item: _done_in(item[1])):
        held = list(part)
        first = cold if held[0][0] < cold else held[0][0] + 1  # what is new to the compiler takes its time once
        times = [row["step_s"] for place, row in held if place >= first] or [row["step_s"] for _, row in held]
        found.append((held[-1][1]["step"], statistics.median(times)))
    return found


def _done_in(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row's step was made of, as far as it decides the time."""
    return repr(row.get("kept_tokens")), *sorted(name for name in row if name.startswith("loss_"))


def _summed(parts: Sequence[tuple[int, float]], steps: int, each: float) -> float:
    """What the first steps cost, of (step, cost of one): between two of them, and after the last one, a step costs what
    the next, or the last, has. each: where there are none."""
    total, before = 0.0, 0
    for step, each in parts:
        total += each * (min(step, steps) - before)
        before = min(step, steps)
    return total + each * (steps - before)


def _steps_in(parts: Sequence[tuple[int, float]], seconds: float) -> float:
    """How many steps are made in so many seconds: the reverse of _summed, of at least one part."""
    before = 0
    for step, each in parts[:-1]:
        if seconds < each * (step - before):
            return before + seconds / each
        seconds -= each * (step - before)
        before = step
    return before + seconds / parts[-1][1]


def _costs(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, TFLOP of a step on all ranks) of a run's rows; a row has the TFLOP/s of a rank."""
    worlds = world_sizes(folder)
    return [
        (row["step"], row["tflops"] * row["step_s"] * worlds[row["attempt"]])
        for row in rows
        if all(is_number(row.get(name)) for name in ("tflops", "step_s", "attempt")) and row["attempt"] in worlds
    ]


def _curve(evaluations: list[dict[str, Any]], sets: list[str]) -> tuple[list[tuple[int, float]], str]:
    points, main = {}, ""
    for row in evaluations:
        if row["weights"] == "student" and row["dataset"] == sets[0]:
            named = row.get("main_metric")
            main = named if isinstance(named, str) else next(iter(row["metrics"]), "")
            if is_number(row["metrics"].get(main)):
                points[row["step"]] = float(row["metrics"][main])
    return sorted(points.items()), main


def summarise(outcomes: Sequence[Outcome], baseline: str) -> list[dict[str, Any]]:
    """A row a recipe, in the order given: means and spreads over the seeds that ended well, and the differences from
    the baseline seed by seed, whose standard error is what the seeds they share leave of the spread."""
    by_recipe: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_recipe.setdefault(outcome.run.row.name, []).append(outcome)
    reference = {outcome.run.seed: outcome for outcome in by_recipe[baseline] if outcome.is_whole}
    times = [outcome.seconds() for outcome in _whole(outcomes) if outcome.pace]
    equal_s = min(times) if times else None
    summary = []
    for name, all_of in by_recipe.items():
        whole = _whole(all_of)
        row: dict[str, Any] = {
            "recipe": name,
            "seeds": len(whole),
            "not_run": len(all_of) - len(whole),
            "baseline": baseline,
            "steps": all_of[0].run.steps,
            "samples": all_of[0].json()["samples"],
            "tflop_per_step": statistics.fmean(outcome.tflop_per_step for outcome in whole or all_of),
        }
        for key in ("step_s", "samples_per_s", "peak_memory_gib"):
            values = [value for outcome in whole if (value := outcome.json()[key]) is not None]
            row[key] = statistics.fmean(values) if values else None
        names = list(dict.fromkeys(metric for outcome in whole for metric in outcome.metrics))
        row["main_metric"] = whole[0].main if whole else ""
        row["metrics"] = {
            metric: _spread([o.metrics[metric] for o in whole if metric in o.metrics]) for metric in names
        }
        row["difference"] = {
            metric: _spread(pairs)
            for metric in names
            if (
                pairs := [
                    outcome.metrics[metric] - reference[outcome.run.seed].metrics[metric]
                    for outcome in whole
                    if outcome.run.seed in reference
                    and metric in outcome.metrics
                    and metric in reference[outcome.run.seed].metrics
                ]
            )
        }
        at_equal = [value for o in whole if equal_s is not None and (value := o.at(equal_s)) is not None]
        row["at_equal_time"] = {"seconds": equal_s} | (_spread(at_equal) if at_equal else {"mean": None})
        summary.append(row)
    return summary


def cells(summary: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for the screen: accuracies in percent."""
    main = next((row["main_metric"] for row in summary if row["main_metric"]), "acc1")
    teacher = f"teacher_{main}"
    has_teacher = any(teacher in row["metrics"] for row in summary)
    seconds = next((row["at_equal_time"]["seconds"] for row in summary), None)
    columns = ["recipe", "seeds", main, "difference"]
    columns += [teacher] if has_teacher else []
    columns += ["steps", "step s", "GiB", "TFLOP/step", f"{main} at {_form(seconds, '.3g')} s"]
    made = []
    for row in summary:
        of = row["difference"].get(main)
        line = [row["recipe"], str(row["seeds"]), _percent(row["metrics"].get(main))]
        line.append("baseline" if row["recipe"] == row["baseline"] else _percent(of, signed=True))
        line += [_percent(row["metrics"].get(teacher))] if has_teacher else []
        line += [str(row["steps"]), _form(row["step_s"], ".3g"), _form(row["peak_memory_gib"], ".2f")]
        line += [_form(row["tflop_per_step"], ".4g"), _percent(row["at_equal_time"])]
        made.append(line)
    return columns, made


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """The main metric against the operations spent: a line a recipe, the mean of its seeds, with their range."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    lines = iter(
        zip(
            ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"] * 9,
            [*["-"] * 7, *["--"] * 7, *[":"] * 49],
        )
    )
    main = next((outcome.main for outcome in outcomes if outcome.main), "acc1")
    for name in dict.fromkeys(outcome.run.row.name for outcome in outcomes):
        drawn = [outcome for outcome in outcomes if outcome.run.row.name == name and outcome.curve]
        curves = [dict(outcome.curve) for outcome in drawn]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        if not shared:
            continue
        spent = [statistics.fmean(outcome.spent(step) for outcome in drawn) for step in shared]
        values = [[100 * curve[step] for curve in curves] for step in shared]
        colour, style = next(lines)
        axis.plot(
            spent,
            [statistics.fmean(of_step) for of_step in values],
            style,
            marker="o",
            markersize=3,
            color=colour,
            label=f"{name} ({len(curves)} seed{'s' if len(curves) > 1 else ''})",
        )
        axis.fill_between(spent, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)
    axis.set_xlabel("training compute [TFLOP, forward and backward]")
    axis.set_ylabel(f"{main}, student [%]")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if axis.has_data():
        axis.legend(fontsize=8)
    axis.set_title("mean over seeds; the band is their range", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _whole(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.is_whole]


def _rows(file: Path, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The last row of each step, weights and set: a resume may have written some again."""
    if not file.exists():
        return []
    newest = {}
    for row in read_lines(file, fields, run_files.MAX_METRICS):
        newest[row["step"], row.get("weights"), row.get("dataset"), row.get("task")] = row
    return [newest[key] for key in sorted(newest, key=lambda key: key[0])]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean; standard deviation of one and standard error of the mean, None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "std": deviation, "std_error": error, "values": list(values)}


def _percent(spread: dict[str, Any] | None, signed: bool = False) -> str:
    if spread is None or spread.get("mean") is None:
        return "-"
    deviation = spread["std_error"] if signed else spread["std"]
    text = f"{100 * spread['mean']:{'+' if signed else ''}.2f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.2f}"


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
