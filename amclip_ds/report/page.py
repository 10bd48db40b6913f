"""The page: what page.html shows of one run or several, as plain values, and the file itself.

Nothing in it asks anything of anywhere: a policy in its head forbids every request and every script but its own, and
all that comes out of a run's folder is escaped by the template.
"""

import base64
import hashlib
import shlex
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from amclip_ds import run_files
from amclip_ds.display import duration, printable
from amclip_ds.files import not_written, write_atomically
from amclip_ds.redact import redact, redact_all
from amclip_ds.report import events as happened
from amclip_ds.report.charts import Chart, Point, buckets, draw, number
from amclip_ds.report.events import Event
from amclip_ds.report.pictures import Pictures, read_pictures
from amclip_ds.report.read import COUNTED, RunFacts, Series, is_measured, read_run
from amclip_ds.report.time_spent import PARTS, Attempt, attempts_of, goodput, total

HERE = Path(__file__).parent
MAX_EVENTS = 400  # rows of the time line
MAX_LOSSES = 200
BY_ATTEMPT = tuple(part for part in PARTS if part != "between")
MARKS = 80  # of one kind, at a chart
LINES = 12  # of one kind, over a curve
MEASURED = {  # column -> (title, unit, whether the axis is logarithmic, whether it begins at 0)
    "grad_norm": ("Gradient norm", "before clipping", True, False),
    "lr": ("Learning rate", "", False, True),
    "momentum": ("Momentum of the teacher", "share of the average that stays", False, False),
    "logit_scale": ("Logit scale", "1 / temperature", False, False),
    "samples_per_s": ("Speed", "samples per second, all ranks", False, True),
    "tflops": ("Arithmetic", "TFLOP per second and GPU", False, True),
    "mfu": ("Model FLOPs utilisation", "share of the GPU's peak", False, True),
    "peak_memory_gib": ("Peak memory", "GiB of a GPU", False, True),
    "kept_tokens": ("Tokens kept", "of a view", False, True),
}
WAITS = {"step_s": "a step", "data_wait_s": "of it, waiting for data", "communication_s": "of it, communication"}
PICTURED = ("loss", *MEASURED, *WAITS)
METRICS = {  # of an evaluation -> how it is called; the first that a set has is drawn
    "acc1": "top-1 accuracy",
    "acc5": "top-5 accuracy",
    "image_retrieval_recall@1": "image retrieval, recall at 1",
    "text_retrieval_recall@1": "text retrieval, recall at 1",
    "image_retrieval_recall@5": "image retrieval, recall at 5",
    "text_retrieval_recall@5": "text retrieval, recall at 5",
}


@dataclass
class Mark:
    """A line over every chart of a run."""

    percent: float
    kind: str
    text: str
    is_short: bool
    """a tick at the edge: there are too many of its kind for lines over the curve"""


@dataclass
class RunPage:
    """What the page shows of one run."""

    id: str
    facts: RunFacts
    attempts: list[Attempt]
    headline: str
    reason: str
    is_well: bool
    tiles: list[tuple[str, str, str]]
    """name, value, remark"""
    charts: dict[str, list[Chart]]
    """heading -> charts"""
    marks: list[Mark]
    events: list[Event]
    num_hidden: int
    """events that are left out"""
    parts: list[tuple[str, str, float, float]]
    """key, name, seconds, share: where the time went"""
    goodput: float | None
    slow_ranks: list[Event]
    num_slow: int
    """with those that are left out"""
    losses: list[happened.Loss]
    num_losses: int
    classes: list[dict[str, Any]]
    commands: list[str]
    pictures: Pictures | None
    label: str = ""
    """what the run is called among others"""
    overview: Chart | None = None

    time_head = ("attempt", "began", "lasted", "ranks", "steps", *(PARTS[part] for part in BY_ATTEMPT))

    @property
    def time_rows(self) -> list[list[Any]]:
        """The time of each attempt."""
        return [
            [
                a.number,
                date(a.began),
                duration(a.wall_s),
                a.world_size or "",
                f"{a.first_step} to {a.last_step}",
                *(duration(a.seconds[part]) if a.seconds[part] else "" for part in BY_ATTEMPT),
            ]
            for a in self.attempts
        ]

    @property
    def slow_rows(self) -> list[tuple[Any, ...]]:
        return [(event.step, event.cause) for event in self.slow_ranks]

    @property
    def memory_rows(self) -> list[tuple[str, ...]]:
        """(part, planned, measured) of a rank's memory, in GiB; what is not known is left empty."""
        planned, measured = (self.facts.plan.get(name) for name in ("predicted", "measured"))
        if not isinstance(planned, dict) or not isinstance(measured, dict):
            return []
        wholes = {"between_steps_gib": "model state between two steps", "peak_gib": "peak of a step"}
        rows = [(word, planned.get(name), measured.get(name)) for name, word in wholes.items()]
        parts = [held if isinstance(held := side.get("by_part"), dict) else {} for side in (planned, measured)]
        rows += [(f"of it: {part}", parts[0].get(part), parts[1].get(part)) for part in {**parts[0], **parts[1]}]
        in_gib = [[f"{gib:.3f}" if is_measured(gib) else "" for gib in held] for _, *held in rows]
        return [(word, *pair) for (word, *_), pair in zip(rows, in_gib)]

    @property
    def loss_rows(self) -> list[tuple[Any, ...]]:
        return [(loss.shard, loss.kind, loss.count, loss.example, loss.effect) for loss in self.losses]

    @property
    def version_rows(self) -> list[tuple[str, str]]:
        return [(name, _word(value)) for name, value in self.facts.versions.items() if name != "command"]

    @property
    def setting_rows(self) -> list[tuple[str, str]]:
        return [(key, _word(value)) for key, value in sorted(self.facts.config.items())]


def write_report(folders: list[Path], out: Path) -> int:
    """Reads the runs and writes the page, old or new in any case. Returns its size in bytes. Raises AmclipError."""
    text = page([read_run(folder) for folder in folders])
    try:
        write_atomically(out, text)
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    return len(text.encode())


def page(runs: list[RunFacts]) -> str:
    """The whole page."""
    from markupsafe import Markup

    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    views = [run_page(f"run{place}", run) for place, run in enumerate(runs)]
    for view, label in zip(views, names_of(runs)):
        view.label = label
    return fill(
        "page.html",
        runs=views,
        several=len(views) > 1,
        comparison=compare(runs) if len(runs) > 1 else [],
        differences=differences(runs) if len(runs) > 1 else [],
        script=Markup(script),
        digest=digest,
        kinds=happened.KINDS,
        written=time.time(),
    )


def fill(template: str, **values: Any) -> str:
    """A template of this folder, its values escaped and made printable, with the page's style."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else printable(redact(value)) if isinstance(value, str) else value

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "date": date, "duration": duration}
    style = Markup((HERE / "page.css").read_text())
    return environment.get_template(template).render(style=style, **values)


def run_page(id: str, run: RunFacts) -> RunPage:
    """One run's part."""
    attempts = attempts_of(run)
    events = happened.events_of(run, attempts)
    headline, reason, is_well = happened.describe_verdict(run, attempts)
    sums = total(attempts)
    whole = sum(sums.values()) or 1.0
    losses = happened.lost_samples(run)
    slow = [event for event in events if event.what == "straggler"]
    shown = shorten(events)
    return RunPage(
        id=id,
        facts=run,
        attempts=attempts,
        headline=headline,
        reason=reason,
        is_well=is_well,
        tiles=tiles(run, attempts, sums, events),
        charts=charts(id, run),
        marks=marks(run, events),
        events=shown,
        num_hidden=len(events) - len(shown),
        parts=[(key, PARTS[key], seconds, seconds / whole) for key, seconds in sums.items() if seconds > 0],
        goodput=goodput(sums),
        slow_ranks=outermost(slow, MAX_LOSSES),
        num_slow=len(slow),
        losses=losses[:MAX_LOSSES],
        num_losses=len(losses),
        classes=[classes(row) for row in run.classes],
        commands=commands(run),
        pictures=read_pictures(run.folder),
        overview=draw(
            f"{id}-overview", "Loss", "as trained on", [("loss", _column(run.metrics, "loss"))], steps=span_of(run)
        ),
    )


def tiles(run: RunFacts, attempts: list[Attempt], sums: dict[str, float], events: list[Event]) -> list[tuple]:
    """The few numbers that one wants first."""
    length = f"of {run.total_steps:,}" if run.total_steps else ""
    found = [("step", f"{run.last_step:,}", length)]
    samples = [value for value in run.metrics.get("samples_seen") if isfinite(value)]
    if samples:
        logged = run.metrics.steps[-1]
        found.append(("samples seen", f"{samples[-1]:,.0f}", f"by step {logged:,}" if logged < run.last_step else ""))
    losses = [value for value in run.metrics.get("loss") if isfinite(value)]
    if losses:
        found.append(("loss", number(losses[-1]), f"{number(losses[0])} at first"))
    for row in best_rows(run):
        name, value = main_metric(row)
        between = interval(row, name)
        found.append((f"{METRICS.get(name, name)}, {evaluated(row)}", f"{value:.1%}", between))
    speeds = [value for value in run.metrics.get("samples_per_s") if isfinite(value)]
    if speeds:
        found.append(("samples per second", number(median(speeds)), "median of the logged steps"))
    share = goodput(sums)
    if share is not None:
        found.append(("goodput", f"{share:.0%}", f"of {duration(sum(sums.values()))}"))
    if attempts:
        found.append(("starts", str(len(attempts)), ""))
    incidents = sum(event.count for event in events if event.kind == happened.INCIDENT)
    found.append(("incidents", f"{incidents:,}", "on the time line below" if incidents else ""))
    return found


def evaluated(row: dict[str, Any]) -> str:
    """What an evaluation is of: set and weights, and the task of a probe, whose metric has a zero-shot name."""
    task = f", {row['task'].replace('_', ' ')}" if row["task"] in run_files.PROBES else ""
    return f"{row['dataset']}{task}, {row['weights']}"


def best_rows(run: RunFacts) -> list[dict[str, Any]]:
    """The last evaluation of each set and weights."""
    latest = {(row["dataset"], row["weights"], row["task"]): row for row in run.evaluations if main_metric(row)[0]}
    return list(latest.values())[:6]


def interval(row: dict[str, Any], name: str) -> str:
    """`95%: 40.0% to 60.0%`; empty where the row has none of that metric."""
    found = row["intervals"].get(name) if isinstance(row.get("intervals"), dict) else None
    is_pair = isinstance(found, list) and len(found) == 2 and all(map(is_measured, found))
    return f"95%: {found[0]:.1%} to {found[1]:.1%}" if found and is_pair else ""


def main_metric(row: dict[str, Any]) -> tuple[str, float]:
    """The headline number of an evaluation, and its name; an empty name where there is none."""
    numbers = {name: value for name, value in row["metrics"].items() if is_measured(value)}
    named = row.get("main_metric")
    for name in (*([named] if isinstance(named, str) else []), *METRICS, *numbers):
        if name in numbers:
            return name, float(numbers[name])
    return "", 0.0


def charts(id: str, run: RunFacts) -> dict[str, list[Chart]]:
    """Every chart of a run, under its heading."""
    data, span = run.metrics, span_of(run)

    def line(column: str) -> list[Point | None]:
        return buckets(data.steps, data.get(column))

    terms = [name for name in data.columns if name.startswith("loss_") and any(data.get(name))]
    further = [
        name
        for name in data.columns
        if name not in (*PICTURED, *COUNTED, "step_applied") and not name.startswith("loss_")
    ]
    learning = [
        draw(f"{id}-loss", "Loss", "as trained on", [("loss", line("loss"))], steps=span),
        draw(
            f"{id}-terms",
            "Terms of the loss",
            "unweighted",
            [(name.removeprefix("loss_"), line(name)) for name in terms],
            steps=span,
        ),
        *evaluations(id, run),
    ]
    schedule: list[Chart | None] = []
    cost: list[Chart | None] = []
    for name, (title, unit, is_log, from_zero) in MEASURED.items():
        chart = draw(
            f"{id}-{name}", title, unit, [(title.lower(), line(name))], steps=span, is_log=is_log, from_zero=from_zero
        )
        (cost if name in ("samples_per_s", "tflops", "mfu", "peak_memory_gib") else schedule).append(chart)
    waits = [(name, line(column)) for column, name in WAITS.items()]
    cost.insert(0, draw(f"{id}-waits", "Time of a step", "seconds", waits, steps=span, from_zero=True))
    others = [draw(f"{id}-{place}", name, "", [(name, line(name))], steps=span) for place, name in enumerate(further)]
    groups = {"Learning": learning, "Schedules and health": schedule, "Cost": cost, "Further numbers": others}
    return {heading: found for heading, drawn in groups.items() if (found := [chart for chart in drawn if chart])}


def evaluations(id: str, run: RunFacts) -> list[Chart | None]:
    """A chart a metric: each set, probe and weights a line, and chance where the number of classes is known."""
    chances = {row["dataset"]: 1 / len(row["per_class"]) for row in run.classes if row["per_class"]}
    found: list[Chart | None] = []
    names = dict.fromkeys(name for row in run.evaluations for name in row["metrics"] if name in METRICS)
    for name in sorted(names, key=list(METRICS).index):
        lines: dict[str, list[Point | None]] = {}
        for row in run.evaluations:
            value = row["metrics"].get(name)
            if is_measured(value):
                point = (float(row["step"]), float(value), float(value), float(value))
                lines.setdefault(evaluated(row), []).append(point)
        if name == "acc1":
            first, last = span_of(run)
            for dataset, chance in chances.items():
                lines[f"chance, {dataset}"] = [(first, chance, chance, chance), (last, chance, chance, chance)]
        found.append(
            draw(
                f"{id}-eval-{len(found)}",
                METRICS[name][0].upper() + METRICS[name][1:],
                "share of the samples",
                lines.items(),
                steps=span_of(run),
                from_zero=True,
            )
        )
    return found


def span_of(run: RunFacts) -> tuple[float, float]:
    """The steps that the charts of a run span."""
    return 0.0, float(max(1, run.last_step))


def marks(run: RunFacts, events: list[Event]) -> list[Mark]:
    """Where incidents, saves and starts are on the axis of steps; those that fall together are one."""
    first, last = span_of(run)
    alike = [
        (event.kind, event.step, event.what, 1)
        for event in events
        if event.kind == happened.SAVE or (event.kind == happened.START and event.step)
    ]
    alike += [
        (happened.INCIDENT, step, happened.in_words(kind), count)
        for (kind, step), count in run.incidents.at_steps.items()
    ]
    found: dict[tuple[str, int], list[tuple[int, str, int]]] = {}
    for kind, step, what, count in alike:
        found.setdefault((kind, int((step - first) / (last - first) * MARKS)), []).append((step, what, count))
    numbers = Counter(kind for kind, _ in found)
    made = []
    for (kind, _), held in found.items():
        step, number_of_them = min(step for step, *_ in held), sum(count for *_, count in held)
        names = ", ".join(list(dict.fromkeys(what for _, what, _ in held))[:3])
        times = f" ({number_of_them})" if number_of_them > 1 else ""
        percent = min(100.0, max(0.0, (step - first) / (last - first) * 100))
        made.append(Mark(round(percent, 2), kind, f"step {step}: {names}{times}", numbers[kind] > LINES))
    return made


def shorten(events: list[Event]) -> list[Event]:
    """The events, or as many as a page can bear: saves and evaluations go first, then incidents, from the middle on;
    at most half of the page is starts and ends."""
    kept: set[int] = set()
    for kinds, room in (
        ((happened.START, happened.END), MAX_EVENTS // 2),
        ((happened.INCIDENT,), MAX_EVENTS),
        ((happened.SAVE, happened.EVALUATION), MAX_EVENTS),
    ):
        alike = [event for event in events if event.kind in kinds]
        kept |= {id(event) for event in outermost(alike, room - len(kept))}
    return [event for event in events if id(event) in kept]


def outermost(events: list[Event], most: int) -> list[Event]:
    """The first and the last of them."""
    return events if len(events) <= most else [*events[: most - most // 2], *events[len(events) - most // 2 :]]


def classes(row: dict[str, Any], most: int = 1000) -> dict[str, Any]:
    """A set's classes, the worst first, and what was taken for what."""
    counts = [
        (str(name), *pair)
        for name, pair in row["per_class"].items()
        if isinstance(pair, list) and len(pair) == 2 and all(type(count) is int for count in pair) and pair[1] > 0
    ]
    counts.sort(key=lambda item: (item[1] / item[2], item[0]))
    listed = row.get("confusions")
    pairs = [pair for pair in listed if isinstance(pair, dict)] if isinstance(listed, list) else []
    return {
        "title": f"{evaluated(row)}, step {row['step']}",
        "classes": counts[:most],
        "confusions": [tuple(str(pair.get(key, "")) for key in ("true", "predicted", "count", "of")) for pair in pairs],
        "matrix": matrix(row.get("confusion_matrix"), list(row["per_class"])),
    }


def matrix(counts: Any, names: list[str]) -> dict[str, Any] | None:
    """The cells of a square table with something in them: (column, row, share of its row); None where it is none."""
    size = len(names)
    is_square = (
        isinstance(counts, list)
        and len(counts) == size
        and all(
            isinstance(row, list) and len(row) == size and all(type(count) is int for count in row) for row in counts
        )
    )
    if not is_square:
        return None
    cells = [(x, y, round(count / sum(row), 2)) for y, row in enumerate(counts) for x, count in enumerate(row) if count]
    return {"size": size, "cells": cells, "names": names}


def commands(run: RunFacts) -> list[str]:
    """The command of each start, as one types it; the same ones once."""
    found = []
    for row in [*run.starts, run.versions]:
        words = row.get("command")
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            rest = redact_all(words[1:])
            found.append(shlex.join(["amclip", *rest]))
    return list(dict.fromkeys(found))


def compare(runs: list[RunFacts]) -> list[Chart]:
    """The curves of several runs over each other."""
    span = (0.0, max(span_of(run)[1] for run in runs))
    named = list(zip(names_of(runs), runs))
    drawn = [
        draw("all-loss", "Loss", "", [(name, _column(run.metrics, "loss")) for name, run in named], steps=span),
        draw(
            "all-contrastive",
            "Contrastive loss",
            "",
            [(name, _column(run.metrics, "loss_contrastive")) for name, run in named],
            steps=span,
        ),
    ]
    for metric in METRICS:
        lines: dict[str, list[Point | None]] = {}
        for name, run in named:
            for row in run.evaluations:
                value = row["metrics"].get(metric)
                if is_measured(value):
                    point = (float(row["step"]), float(value), float(value), float(value))
                    lines.setdefault(f"{name}: {evaluated(row)}", []).append(point)
        drawn.append(draw(f"all-{metric}", METRICS[metric], "", lines.items(), steps=span, from_zero=True))
    drawn.append(
        draw(
            "all-speed",
            "Speed",
            "samples per second",
            [(name, _column(run.metrics, "samples_per_s")) for name, run in named],
            steps=span,
            from_zero=True,
        )
    )
    return [chart for chart in drawn if chart]


def names_of(runs: Iterable[RunFacts]) -> list[str]:
    """A name each: of folders that are called alike, the whole path."""
    runs = list(runs)
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs)]


def differences(runs: list[RunFacts]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every setting and version in which they differ."""
    keys = sorted({key for run in runs for key in run.config})
    found = []
    for key in keys:
        values = [_word(run.config[key]) if key in run.config else "(no such key)" for run in runs]
        if len(set(values)) > 1:
            found.append((key, values))
    for name in sorted({name for run in runs for name in run.versions if name != "command"}):
        values = [_word(run.versions.get(name)) for run in runs]
        if len(set(values)) > 1:
            found.append((f"version of {name}", values))
    return found


def _column(data: Series, name: str) -> list[Point | None]:
    return buckets(data.steps, data.get(name))


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def date(seconds: float) -> str:
    """`2026-11-27 03:15:02 UTC`; empty for an unknown time."""
    if not 0 < seconds < 1e11:
        return ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
