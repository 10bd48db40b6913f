"""A sweep: which overrides each run of an array has, and the table of what came of them (slurm/sweep.sbatch).

A sweep file is a list of `{key: value}` maps, or `grid:` with a list of values for each key: every combination.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds import configfile, plain_yaml, plugins, run_files
from amclip_ds.arguments import add_plugin
from amclip_ds.display import one_line, printable
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.files import read_json, write_atomically
from amclip_ds.jsonl import read
from amclip_ds.redact import redact

MAX_RUNS = 10_000  # Slurm's arrays end at 1,001 where nobody changed it


def read_sweep(path: Path) -> list[dict[str, Any]]:
    """The overrides of every run, in order. Raises UserError."""
    content = plain_yaml.read(path)
    if isinstance(content, dict) and isinstance(content.get("grid"), dict) and len(content) == 1:
        grid = {key: values if isinstance(values, list) else [values] for key, values in content["grid"].items()}
        if math.prod(len(values) for values in grid.values()) > MAX_RUNS:
            raise UserError(f"sweep {path}: its grid has more than {MAX_RUNS} combinations")
        content = [dict(zip(grid, combination)) for combination in itertools.product(*grid.values())]
    if not content or not isinstance(content, list) or not all(isinstance(run, dict) for run in content):
        raise UserError(f"sweep {path}: expected a list of `key: value` maps, or `grid:` with a list for each key")
    return content


def overrides_of(path: Path, index: int) -> list[str]:
    """`key=value` words of one run. Raises UserError for an index outside the sweep."""
    runs = read_sweep(path)
    if not 0 <= index < len(runs):
        raise UserError(f"sweep {path} has {len(runs)} runs: --array=0-{len(runs) - 1}, there is no run {index}")
    words = [f"{key}={_word(value)}" for key, value in runs[index].items()]
    check_words(path, index, words)
    return words


def check_words(path: Path, index: int, words: list[str]) -> None:
    """Raises UserError for what would not reach the run as one word, or not be taken there.

    A word a line goes to sweep.sbatch, so a line end would make two of one; and `$NAME` would be filled in, which no
    file may ask for.
    """
    for word in words:
        if not word.isprintable() or "$" in word:
            what = "a `$`, which only a command line may have" if "$" in word else "a line end or control character"
            raise UserError(f"sweep {path}: run {index}: {word!r} holds {what}")
    try:
        configfile.read_overrides(words, settings.keys_and_types())
    except UserError as error:
        raise UserError(f"sweep {path}: run {index}: {error}") from None


def finish(path: Path, out: Path, index: int, code: int) -> bool:
    """Notes how a run ended. Returns whether it was the last one; the table is then written."""
    folder = out / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{index}.json", json.dumps({"index": index, "code": code}))
    over = all((folder / f"{number}.json").exists() for number in range(len(read_sweep(path))))
    if over:  # of two that end together both write the same table
        rows = table(path, out)
        write_atomically(out / "sweep.json", json.dumps(rows, indent=1) + "\n")
        write_atomically(out / "sweep.txt", render(rows))
    return over


def table(path: Path, out: Path) -> list[dict[str, Any]]:
    """A row for each run: its overrides, its exit code (None: not over), last step, loss and accuracies, and how many
    lines of its records cannot be read, if any."""
    rows = []
    for index, overrides in enumerate(read_sweep(path)):
        run = out / str(index)
        note = out / "sweep" / f"{index}.json"
        metrics, unreadable = read(run / run_files.METRICS, run_files.STEP, run_files.MAX_METRICS)
        evaluations, more = read(run / run_files.EVALUATIONS, run_files.EVALUATION)
        row = {"run": index, **overrides, "code": _code_of(note)}
        row |= {name: metrics[-1].get(name) if metrics else None for name in ("step", "loss")}
        for line in sorted(evaluations, key=lambda line: line["step"]):  # later lines win: the newest evaluation
            for metric in ("acc1", "image_retrieval_recall@1"):
                if metric in line["metrics"] and line["task"] not in run_files.PROBES:
                    row[f"{line['weights']} {line['dataset']} {metric}"] = line["metrics"][metric]
        rows.append(row | ({"unreadable lines": unreadable + more} if unreadable + more else {}))
    return rows


def _code_of(note: Path) -> int | None:
    """The exit code that a run of the sweep left; None where it is not over, or its note cannot be read."""
    try:
        code = read_json(note, dict).get("code")
    except UserError:
        return None
    return code if type(code) is int else None


def render(rows: list[dict[str, Any]]) -> str:
    """The rows as text in columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() + "\n" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else one_line(redact(str(value)))


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="sweep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("overrides", "finish", "table"):
        sub = commands.add_parser(name, allow_abbrev=False)
        sub.add_argument("sweep", type=Path)
        if name != "overrides":
            sub.add_argument("out", type=Path)
        if name != "table":
            sub.add_argument("index", type=int)
        if name == "finish":
            sub.add_argument("code", type=int)
        if name == "overrides":
            add_plugin(sub)
    args = parser.parse_args(argv)
    try:
        if args.command == "overrides":
            plugins.load(args.plugin)  # their keys may be swept
            print(*overrides_of(args.sweep, args.index), sep="\n")
        elif args.command == "table":
            print(printable(render(table(args.sweep, args.out))), end="")
        elif finish(args.sweep, args.out, args.index, args.code):
            print(f"sweep over; {args.out}/sweep.txt:\n{(args.out / 'sweep.txt').read_text()}", end="")
    except AmclipError as error:
        print(printable(f"sweep.sbatch: {error}"))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
