"""The study: when does attention pay, what do the further losses need, what does a point of accuracy cost? On synthetic
scenes, by `amclip compare`, cell by cell and row by row; stopped, it resumes.

    python -m benchmarks.study list                                  the grid: which runs there are
    python -m benchmarks.study run OUT --seeds 3 --steps 900         days on two cores; any part of it counts
    python -m benchmarks.study run OUT --cells base --rows clip random2x aclip
    python -m benchmarks.study times OUT                             seconds of a step of each row, with nothing beside
    python -m benchmarks.study table OUT                             what is there, and the runs that are not
    python -m benchmarks.study runs OUT > runs.csv                   each run's curve, average, cost and masks' numbers
    python -m benchmarks.study run OUT --cells photographs --source CIFAR     the same rows on photographs

The grid below was committed before any of it ran (docs/results/study.md): nothing is tuned until it fits. Every row of
a cell has the same samples in the same order and as many steps; accuracy at equal time is read from its curve. Captions
of scenes name colours, so colour changes are those that keep them (data.keep_colours), in every row that has any.
Photographs: a folder of train/CLASS/*.jpg and test/CLASS/*.jpg, as CIFAR-10's images are published (60,000 of 32 px);
a caption is one of CLIP's 7 prompts of its class.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from amclip_ds import run_files
from amclip_ds.cli import main as amclip
from amclip_ds.compare.compare import STOPPED, Comparison, compare, plan_runs
from amclip_ds.compare.runs import CURVE_POINTS, Budget, Run
from amclip_ds.compare.table import read_outcome
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.evaluate.names import OPENAI_7, templates
from amclip_ds.jsonl import is_number, read_lines
from amclip_ds.record import read_verdict

TRAIN, TEST, BATCH = 20_000, 2_048, 64
SEEDS = 3
REFERENCE = "random2x"
TIMES, TIMED = "times.json", 60
"""the file of the rows' times in OUT; steps that each is timed over"""
STATISTICS = ("object_share", "mask_overlap", "mask_score_entropy")
"""of a run's masks at its end: the share of the object's tokens kept in its eight pictures (an order, no measurement),
of the kept tokens that two views share, the scores' entropy as a share of its maximum"""
COLUMNS = [
    *("cell", "row", "seeds", "at half", "at the end", "mean", "against random2x", "average", "at equal time"),
    *("step ms", "TFLOP a step", "object kept", "overlap", "entropy"),
]


@dataclass(frozen=True)
class Cell:
    """A set of scenes, or the photographs, and a kept fraction."""

    keep_ratio: float
    small_objects: bool = False
    coloured: bool = False
    photographs: bool = False

    @property
    def name(self) -> str:
        if self.photographs:
            return f"keep{self.keep_ratio:g}-photographs"
        objects, clutter = "small" if self.small_objects else "large", "coloured" if self.coloured else "grey"
        return f"keep{self.keep_ratio:g}-{objects}-{clutter}"


@dataclass(frozen=True)
class Row:
    """A recipe, and the settings that make it another; masked: whether the cell's kept fraction is its own."""

    recipe: str
    words: tuple[str, ...] = ()
    masked: bool = True


CELLS = [Cell(*choice) for choice in product((0.5, 0.25), (False, True), (False, True))]
PHOTOGRAPHS = [Cell(0.5, photographs=True), Cell(0.25, photographs=True)]
BASE = CELLS[0]
NO_LOSSES = ("loss.o2o_weight=0", "loss.o2e_weight=0")
ROWS = {  # of every cell
    "clip": Row("clip", masked=False),
    "random1x": Row("random2x", ("data.num_views=1",)),
    "random2x": Row("random2x"),
    "attentive2x": Row("aclip", NO_LOSSES),
    "aclip": Row("aclip"),
    "inverse": Row("aclip", ("mask.strategy=attentive_inverse",)),
}
ROWS_OF_BASE = {  # of the first cell alone
    "attentive1x": Row("aclip", (*NO_LOSSES, "data.num_views=1")),
    "aclip-eff": Row("aclip-eff"),
    "slip": Row("slip", masked=False),
    "maskclip": Row("maskclip", masked=False),
    "detailclip": Row("detailclip"),
    "centered": Row("centered"),
    "cluster": Row("cluster"),
    "pgs": Row("pgs"),
    "frequency": Row("frequency"),
}
# Added when the grid had run in part, for what its rows leave mixed: the inverse without further losses, and masks
# under the settings of `centered` (the patch embedding trained, no colour changes, one view), which clip has too.
ROWS_ADDED = {
    "inverse2x": Row("aclip", (*NO_LOSSES, "mask.strategy=attentive_inverse")),
    "random1x-plain": Row("centered", ("mask.strategy=random",)),
    "attentive1x-plain": Row("centered", ("mask.strategy=attentive", "mask.unit=2")),
}


def rows_of(cell: Cell) -> dict[str, Row]:
    """The rows that a cell has."""
    return ROWS | (ROWS_OF_BASE | ROWS_ADDED if cell == BASE else {})


def grid(cells: list[str], rows: list[str]) -> Iterator[tuple[Cell, str, Row]]:
    """(cell, name, row) of what is asked for; all scenes where nothing is named."""
    for cell in cells_of(cells):
        asked = {cell.name, *(["base"] if cell == BASE else []), *(["photographs"] if cell.photographs else [])}
        if cells and not asked & set(cells):
            continue
        for name, row in rows_of(cell).items():
            if not rows or name in rows:
                yield cell, name, row


def cells_of(asked: list[str]) -> list[Cell]:
    """The grid that cells of these names are in."""
    return PHOTOGRAPHS if any("photographs" in name for name in asked) else CELLS


def images_of(out: Path, cell: Cell, source: Path | None) -> Path:
    """The cell's images, made where they are missing; cells that differ in the kept fraction alone share them."""
    if cell.photographs:
        return pack_photographs(out / "photographs", source)
    folder = out / "scenes" / cell.name.partition("-")[2]
    write_dataset(folder, TRAIN, TEST, coloured_distractors=cell.coloured, small_objects=cell.small_objects)
    return folder


def pack_photographs(folder: Path, source: Path | None) -> Path:
    """folder/train, tars of all of source/train/CLASS/*.jpg in an order that is a function of their names; folder/test,
    links to as many images a class of source/test as make TEST of all. Raises SystemExit without a source."""
    if (folder / "train").exists():
        return folder
    if source is None or not (classes := sorted(path.name for path in (source / "train").glob("*/"))):
        raise SystemExit("--source: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    images = [(name, path) for name in classes for path in sorted((source / "train" / name).glob("*.jpg"))]
    Random(0).shuffle(images)  # training shuffles within windows
    prompts = templates(folder, OPENAI_7, "")
    for name in classes:
        (folder / "test" / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / "test" / name).glob("*.jpg"))[: -(-TEST // len(classes))]:
            if not (link := folder / "test" / name / path.name).exists():
                link.symlink_to(path.resolve())
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "caption"])
        for number, (name, path) in enumerate(images):
            rows.writerow([path.resolve(), prompts[number % len(prompts)].format(c=name)])
    if amclip(["data", "pack", str(folder / "pairs.csv"), "--out", str(folder / "packed")]) != 0:
        raise SystemExit(f"--source: {source} could not be packed")
    (folder / "packed").rename(folder / "train")  # a pack that was stopped is continued
    return folder


def recipe_file(out: Path, cell: Cell, name: str, row: Row, table: Path) -> str:
    """The row as a yaml of its own, OUT/CELL/rows/NAME.yaml."""
    words = [*row.words, *([f"mask.keep_ratio={cell.keep_ratio}"] if row.masked else [])]
    if row.recipe == "frequency":
        words.append(f"data.text_mask.table={table}")
    tree: dict[str, Any] = {"recipe": f"{row.recipe}-tiny"}
    for word in words:
        key, _, value = word.partition("=")
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = json.loads(value) if value[:1].isdigit() else value
    path = out / cell.name / "rows" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n")  # JSON is yaml
    return str(path)


def run_cell(out: Path, cell: Cell, rows: dict[str, Row], seeds: int, steps: int, source: Path | None = None) -> int:
    """Trains what is missing of a cell's rows. Returns the exit code."""
    images = images_of(out, cell, source)
    table = images / "words.json"
    if not table.exists() and any(row.recipe == "frequency" for row in rows.values()):
        amclip(["data", "stats", str(images / "train"), "--words", str(table)])
    recipes = [recipe_file(out, cell, name, row, table) for name, row in rows.items()]
    baseline = "clip" if "clip" in rows else next(iter(rows))
    folder = out / cell.name / "runs"
    ask = Comparison(recipes, words_of_all(cell, images), seeds, Budget("steps", steps), baseline, folder, 1, [])
    link_unmasked(out, cell, plan_runs(ask, lambda row, ask: 0.0))  # no time is measured for a budget of steps
    return compare(ask)[1]


def words_of_all(cell: Cell, images: Path) -> list[str]:
    """The settings that every run of a cell has. The photographs' captions name no colours."""
    words = [f"data.train={images}/train", f"eval.data={images}{'/test' if cell.photographs else ''}"]
    words += [f"batch.global_size={BATCH}", f"batch.per_gpu={BATCH}", "teacher.always=true"]
    return words if cell.photographs else [*words, "data.keep_colours=true"]


def link_unmasked(out: Path, cell: Cell, runs: list[Run]) -> None:
    """A row that masks nothing trains the same run in cells that differ in the kept fraction alone: where another cell
    has it whole, it is linked and not trained again."""
    twins = [
        other for other in CELLS + PHOTOGRAPHS if other != cell and replace(other, keep_ratio=cell.keep_ratio) == cell
    ]
    for run in runs:
        for twin in twins if not rows_of(cell)[run.row.name].masked else []:
            source = out / twin.name / "runs" / run.folder.name
            if not os.path.lexists(run.folder) and read_outcome(replace(run, folder=source)).is_whole:
                run.folder.symlink_to(os.path.relpath(source, run.folder.parent))


def began(out: Path, cell: Cell, name: str) -> bool:
    """Whether there are runs of a row, which the cell's table is then to have."""
    return any((out / cell.name / "runs").glob(f"{name}-seed*"))


def table(out: Path, steps: int, cells: list[Cell] = CELLS, seeds: int = SEEDS) -> str:
    """Markdown: a line a row of each cell, of its whole runs, and how many runs there are not."""
    lines, missing = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"], []
    times = read_times(out)
    for cell in cells:
        found = {name: read_runs(out, cell, name, steps, seeds) for name in rows_of(cell)}
        reference = found[REFERENCE]
        costs = [times[cost] * steps for name in found if found[name] and (cost := (cell.keep_ratio, name)) in times]
        first = cell.name
        for name, runs in found.items():
            missing += [f"{cell.name} {name} {seed}" for seed in range(seeds) if seed not in runs]
            if not runs:
                continue
            pairs = [runs[seed].at(steps) - reference[seed].at(steps) for seed in runs if seed in reference]
            step_s = times.get((cell.keep_ratio, name))
            line = [first, name, ", ".join(map(str, runs))]
            line += [", ".join(f"{run.at(step):.1f}" for run in runs.values()) for step in (steps // 2, steps)]
            line += [spread([run.at(steps) for run in runs.values()])]
            line += ["" if name == REFERENCE else spread(pairs, "+.1f"), spread([run.average for run in runs.values()])]
            line += [spread([run.at(min(costs) / step_s) for run in runs.values()]) if step_s else ""]
            line += [f"{1000 * step_s:.0f}" if step_s else "", f"{fmean(run.tflop for run in runs.values()):.4f}"]
            for key in STATISTICS:
                values = [run.statistics[key] for run in runs.values() if key in run.statistics]
                line.append(f"{fmean(values):.2f}" if values else "")
            lines.append(f"| {' | '.join(line)} |")
            first = ""
    total = seeds * sum(len(rows_of(cell)) for cell in cells)
    return "\n".join([*lines, "", f"{total - len(missing)} of {total} runs. Not run: {', '.join(missing) or 'none'}."])


def runs_csv(out: Path, steps: int, cells: list[Cell] = CELLS, seeds: int = SEEDS) -> str:
    """A line a whole run: its curve at a tenth of the steps and on, and what else the table is made of."""
    points = [steps * tenth // CURVE_POINTS for tenth in range(1, CURVE_POINTS + 1)]
    lines = [["cell", "row", "seed", *(f"acc1 at {step}" for step in points), "average", "tflop a step", *STATISTICS]]
    for cell in cells:
        for name in rows_of(cell):
            for seed, run in read_runs(out, cell, name, steps, seeds).items():
                curve = [f"{run.at(step):.2f}" for step in points]
                masks = [f"{run.statistics[key]:.3f}" if key in run.statistics else "" for key in STATISTICS]
                lines.append([cell.name, name, str(seed), *curve, f"{run.average:.2f}", f"{run.tflop:.5f}", *masks])
    return "\n".join(map(",".join, lines))


@dataclass(frozen=True)
class Ended:
    """A whole run. curve: (step, top-1 of the student in %); average: the teacher's at the end; tflop: of a step."""

    curve: list[tuple[int, float]]
    average: float
    tflop: float
    statistics: dict[str, float]

    def at(self, step: float) -> float:
        """Top-1 after so many steps, in proportion between two evaluations, and from 0 at the start."""
        steps, values = zip(*[(0, 0.0), *self.curve])
        return float(np.interp(step, steps, values))


def read_runs(out: Path, cell: Cell, name: str, steps: int, seeds: int) -> dict[int, Ended]:
    """A row's whole runs of this length, by seed."""
    found = {}
    for seed in range(seeds):
        folder = out / cell.name / "runs" / f"{name}-seed{seed}"
        verdict = read_verdict(folder)
        evaluations = read_lines(folder / run_files.EVALUATIONS)
        if verdict is None or verdict["code"] != 0 or not evaluations or evaluations[-1]["step"] != steps:
            continue
        accuracy = {(row["weights"], row["step"]): 100 * row["metrics"]["acc1"] for row in evaluations}
        rows = read_lines(folder / run_files.METRICS)
        masks = read_lines(folder / run_files.MASKS)
        numbers = rows[-1] | (masks[-1] if masks else {})
        found[seed] = Ended(
            [(step, value) for (weights, step), value in sorted(accuracy.items()) if weights == "student"],
            accuracy["teacher", steps],
            fmean(row["tflops"] * row["step_s"] for row in rows),
            {key: float(numbers[key]) for key in STATISTICS if is_number(numbers.get(key))},
        )
    return found


def measure_times(out: Path, asked: list[tuple[Cell, str, Row]], rounds: int = 3) -> None:
    """Seconds of a step of each row at each kept fraction, one run after another, in rounds; into OUT/times.json."""
    taken: dict[tuple[float, str], list[float]] = {}
    folder = out / "timing"
    for _ in range(rounds):
        for cell, name, row in asked:
            if cell.coloured or cell.small_objects:
                continue  # the same step
            images = images_of(out, cell, None)
            recipe = recipe_file(out, cell, name, row, images / "words.json")
            shutil.rmtree(folder, ignore_errors=True)
            words = [*words_of_all(cell, images), f"run.out={folder}", f"run.steps={TIMED}", "log.every_steps=5"]
            command = [sys.executable, "-m", "amclip_ds", "train", recipe, *words, "eval.every_steps=null"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            rows = read_lines(folder / run_files.METRICS)
            taken.setdefault((cell.keep_ratio, name), []).append(median(row["step_s"] for row in rows[2:]))
            print(f"times: {cell.name} {name}: {taken[cell.keep_ratio, name][-1]:.4f} s a step", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    kept = [[*key, median(values)] for key, values in ({k: [v] for k, v in read_times(out).items()} | taken).items()]
    (out / TIMES).write_text(json.dumps(kept, indent=1) + "\n")


def read_times(out: Path) -> dict[tuple[float, str], float]:
    """Seconds of a step by (kept fraction, row); a row that masks nothing has those of the first at every fraction."""
    file = out / TIMES
    times = {(ratio, name): step_s for ratio, name, step_s in json.loads(file.read_text())} if file.exists() else {}
    unmasked = {name for name, row in rows_of(BASE).items() if not row.masked}
    shared = {
        (cell.keep_ratio, name): times[BASE.keep_ratio, name]
        for cell in CELLS
        for name in unmasked
        if (BASE.keep_ratio, name) in times
    }
    return shared | times


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """`12.3 \u00b1 0.4`: the mean and its standard error; empty where there is none."""
    if not values:
        return ""
    return f"{fmean(values):{form}}" + (f" \u00b1 {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "run", "times", "table", "runs"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("study"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--cells", nargs="+", default=[], help="by name, or base, or photographs")
    parser.add_argument("--source", type=Path, help="the photographs: a folder of train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--rows", nargs="+", default=[])
    args = parser.parse_args()
    cells, asked = cells_of(args.cells), list(grid(args.cells, args.rows))
    if args.action == "list":
        print(
            "\n".join(
                f"{cell.name} {name}: {row.recipe}-tiny {' '.join(row.words)}".rstrip() for cell, name, row in asked
            )
        )
        return 0
    code = 0
    if args.action == "runs":
        print(runs_csv(args.out, args.steps, cells, args.seeds))
        return 0
    if args.action == "times":
        measure_times(args.out, asked)
    if args.action == "run":
        for cell in cells:
            names = {name for one, name, _ in asked if one == cell}
            rows = {name: row for name, row in rows_of(cell).items() if name in names or began(args.out, cell, name)}
            code = max(code, run_cell(args.out, cell, rows, args.seeds, args.steps, args.source) if names else 0)
            if code in STOPPED:
                break
    print(table(args.out, args.steps, cells, args.seeds))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
