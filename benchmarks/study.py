"""The study: when does attention pay, what do the further losses need, what does a point of accuracy cost? On synthetic
scenes, by `amclip compare`, cell by cell and row by row; stopped, it goes on where it was.

    python -m benchmarks.study list                                  the grid: which runs there are, and which are whole
    python -m benchmarks.study run OUT --seeds 3 --steps 900         days on two cores; any part of it counts
    python -m benchmarks.study run OUT --cells base --rows clip random2x aclip
    python -m benchmarks.study table OUT                             what is there, and the rows that were not run

The grid below was committed before any of it ran (docs/results/study.md): nothing is tuned until it fits. Every row of
a cell has the same samples in the same order, as many steps, and `compare`'s accuracy at equal time beside it. Captions
name colours, so colour changes are those that keep them (data.keep_colours), in every row that has any.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from amclip_ds import run_files
from amclip_ds.cli import main as amclip
from amclip_ds.compare.compare import Comparison, compare, plan_runs
from amclip_ds.compare.runs import Budget, Run
from amclip_ds.compare.table import read_outcome
from amclip_ds.data.synthetic import write_dataset
from amclip_ds.jsonl import is_number, read_lines

TRAIN, TEST, BATCH = 20_000, 2_048, 64
STATISTICS = ("mask_kept", "mask_overlap", "mask_score_entropy")


@dataclass(frozen=True)
class Cell:
    """A set of scenes and a kept fraction."""

    keep_ratio: float
    small_objects: bool
    coloured: bool

    @property
    def name(self) -> str:
        objects, clutter = "small" if self.small_objects else "large", "coloured" if self.coloured else "grey"
        return f"keep{self.keep_ratio:g}-{objects}-{clutter}"


@dataclass(frozen=True)
class Row:
    """A recipe, and the settings that make it another; masked: whether the cell's kept fraction is its own."""

    recipe: str
    words: tuple[str, ...] = ()
    masked: bool = True


CELLS = [Cell(*choice) for choice in product((0.5, 0.25), (False, True), (False, True))]
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


def rows_of(cell: Cell) -> dict[str, Row]:
    """The rows that a cell has."""
    return ROWS | (ROWS_OF_BASE if cell == BASE else {})


def grid(cells: list[str], rows: list[str]) -> Iterator[tuple[Cell, str, Row]]:
    """(cell, name, row) of what is asked for; all where nothing is named."""
    for cell in CELLS:
        if cells and cell.name not in cells and not (cell == BASE and "base" in cells):
            continue
        for name, row in rows_of(cell).items():
            if not rows or name in rows:
                yield cell, name, row


def scenes_of(out: Path, cell: Cell) -> Path:
    """The cell's scenes, made where they are missing; cells that differ in the kept fraction alone share them."""
    folder = out / "scenes" / cell.name.partition("-")[2]
    write_dataset(folder, TRAIN, TEST, coloured_distractors=cell.coloured, small_objects=cell.small_objects)
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


def run_cell(out: Path, cell: Cell, rows: dict[str, Row], seeds: int, steps: int) -> int:
    """Trains what is missing of a cell's rows. Returns the exit code."""
    scenes = scenes_of(out, cell)
    table = scenes / "words.json"
    if not table.exists() and any(row.recipe == "frequency" for row in rows.values()):
        amclip(["data", "stats", str(scenes / "train"), "--words", str(table)])
    recipes = [recipe_file(out, cell, name, row, table) for name, row in rows.items()]
    words = [f"data.train={scenes}/train", f"eval.data={scenes}", f"batch.global_size={BATCH}"]
    words += [f"batch.per_gpu={BATCH}", "data.keep_colours=true", "teacher.always=true"]
    baseline = "clip" if "clip" in rows else next(iter(rows))
    ask = Comparison(recipes, words, seeds, Budget("steps", steps), baseline, out / cell.name / "runs", 1, [])
    link_unmasked(out, cell, plan_runs(ask, lambda row, ask: 0.0))  # no time is measured for a budget of steps
    return compare(ask)[1]


def link_unmasked(out: Path, cell: Cell, runs: list[Run]) -> None:
    """A row that masks nothing trains the same run in cells that differ in the kept fraction alone: where another cell
    has it whole, it is linked and not trained again."""
    twins = [other for other in CELLS if other != cell and replace(other, keep_ratio=cell.keep_ratio) == cell]
    for run in runs:
        for twin in twins if not rows_of(cell)[run.row.name].masked else []:
            source = out / twin.name / "runs" / run.folder.name
            if not os.path.lexists(run.folder) and read_outcome(replace(run, folder=source)).is_whole:
                run.folder.symlink_to(os.path.relpath(source, run.folder.parent))


def began(out: Path, cell: Cell, name: str) -> bool:
    """Whether there are runs of a row, which the cell's table is then to have."""
    return any((out / cell.name / "runs").glob(f"{name}-seed*"))


def table(out: Path) -> str:
    """Markdown: a line a row of each cell, and the rows that were not run."""
    lines, missing = (
        [
            "| cell | row | seeds | acc1, % | teacher, % | against the baseline | at equal time | masks |",
            "|---|---|---|---|---|---|---|---|",
        ],
        [],
    )
    for cell in CELLS:
        file = out / cell.name / "runs" / "compare.json"
        found = json.loads(file.read_text()) if file.exists() else {"summary": [], "rows": []}
        done = {row["recipe"]: row for row in found["summary"] if row["seeds"]}
        for name in rows_of(cell):
            if name not in done:
                missing.append(f"{cell.name} {name}")
                continue
            row = done[name]
            cells = [spread(row["metrics"].get(metric)) for metric in ("acc1", "teacher_acc1")]
            cells += [spread(row["difference"].get("acc1")), spread(row["at_equal_time"])]
            masks = statistics_of([Path(one["run"]) for one in found["rows"] if one["recipe"] == name])
            lines.append(f"| {cell.name} | {name} | {row['seeds']} | {' | '.join(cells)} | {masks} |")
    return "\n".join([*lines, "", f"Not run ({len(missing)}): {', '.join(missing) or 'none'}."])


def spread(value: dict[str, Any] | None) -> str:
    """`12.3 \u00b1 0.4`, in percent; empty where there is none."""
    if not value or value.get("mean") is None:
        return ""
    off = value.get("std_error", value.get("std"))
    return f"{100 * value['mean']:.1f}" + (f" \u00b1 {100 * off:.1f}" if off is not None else "")


def statistics_of(folders: list[Path]) -> str:
    """The masks' numbers at the end of the runs, their mean: `kept 0.50, overlap 0.61, score entropy 0.93`."""
    found = []
    for name in STATISTICS:
        values = [
            rows[-1][name]
            for folder in folders
            if (rows := read_lines(folder / run_files.METRICS)) and is_number(rows[-1].get(name))
        ]
        if values:
            found.append(f"{name.removeprefix('mask_').replace('_', ' ')} {sum(values) / len(values):.2f}")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "run", "table"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("study"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--cells", nargs="+", default=[], help="by name, or base")
    parser.add_argument("--rows", nargs="+", default=[])
    args = parser.parse_args()
    asked = list(grid(args.cells, args.rows))
    if args.action == "list":
        print(
            "\n".join(
                f"{cell.name} {name}: {row.recipe}-tiny {' '.join(row.words)}".rstrip() for cell, name, row in asked
            )
        )
        return 0
    code = 0
    if args.action == "run":
        for cell in CELLS:
            names = {name for one, name, _ in asked if one == cell}
            rows = {name: row for name, row in rows_of(cell).items() if name in names or began(args.out, cell, name)}
            code = max(code, run_cell(args.out, cell, rows, args.seeds, args.steps) if names else 0)
    print(table(args.out))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
