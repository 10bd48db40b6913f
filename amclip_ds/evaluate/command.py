"""`amclip eval`: opens the source, runs the tasks with all ranks, prints a table, writes JSON, appends to the run."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from amclip_ds import display, json_file
from amclip_ds.errors import UserError
from amclip_ds.evaluate import suites, token_removal
from amclip_ds.evaluate.datasets import check_distinct
from amclip_ds.evaluate.encoder import Encoder
from amclip_ds.evaluate.rows import append_new, mark_asked
from amclip_ds.evaluate.source import Located, locate, open_encoder
from amclip_ds.evaluate.tasks import open_for, run_task
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm, on_all, on_main
from amclip_ds.shards.sources import split_sources


def evaluate(args: argparse.Namespace) -> int:
    """Returns the exit code. Collective: every rank of the world must call."""
    with ExitStack() as stack:
        runtime = engine_runtime.start()
        stack.callback(engine_runtime.stop, runtime)
        located = on_main(lambda: locate(args.source))
        names = located.weights if args.weights == "both" else (args.weights,)
        for name in names:
            located.check_holds(name)
        suite = on_all(lambda: suites.find(args.suite, args.data or [])) if args.suite else None
        specs, key = _specs_of(args, located, suite)
        opened = on_all(
            lambda: [
                open_for(task, spec, args.split, args.classnames, args.templates, key)
                for spec in specs
                for task in args.task or ["auto"]
            ]
        )
        check_distinct([data for _, data, _ in opened], key)
        opened = list({(data.name, task): (task, data, train) for task, data, train in opened}.values())
        if suite:
            suites.check(suite, [data for _, data, _ in opened])
        if runtime.is_main:
            kept = f"; {token_removal.check(args.source, args.keep_ratio)}" if args.keep_ratio < 1 else ""
            print(f"{located.path}: {located.kind}, step {located.step}; {', '.join(names)}{kept}", flush=True)
            for line in suite.lines() if suite else ():
                print(line, flush=True)
            for line in dict.fromkeys(data.describe() for _, data, _ in opened):
                print(line, flush=True)
        comm, evaluated = DistributedComm(), []  # (the folder that was evaluated, its row)
        for name in names:
            encoder: Encoder = open_encoder(located, name, runtime.device, args.preprocess, args.keep_ratio)
            encoder.say = partial(print, flush=True)
            for task, data, train in opened:
                row = run_task(task, encoder, data, args.batch_size, comm, located.step, train)
                evaluated.append((data.folder, row))
        on_main(lambda: _hand_over(evaluated, located, args, suite))
    return 0


def _specs_of(args: argparse.Namespace, located: Located, suite: suites.Found | None) -> tuple[list[str], str]:
    """What to evaluate on, and what the user named it by: --suite, --data, else the run's own eval.data.

    Raises UserError.
    """
    if suite is not None:
        return [str(folder) for folder in suite.folders.values()], f"--suite {suite.suite}"
    own = (located.config.eval.data or "") if located.config else ""
    if not args.data and not own:
        raise UserError("--data: name a data set; the source has no eval.data")
    return (args.data, "--data") if args.data else (split_sources(own), "eval.data")


def _hand_over(
    evaluated: list[tuple[str, dict[str, Any]]], located: Located, args: argparse.Namespace, suite: suites.Found | None
) -> None:
    averages = suites.report(suite, evaluated) if suite else []
    rows = [row for _, row in evaluated]
    mark_asked(rows)
    if args.keep_ratio < 1:
        token_removal.mark(rows, args.keep_ratio)
        averages = [f"{line} (keep={args.keep_ratio})" for line in averages]
    print_table(rows)
    for line in averages:
        print(line)
    if args.csv:
        suites.write_csv(args.csv, rows, str(located.path))
    named = [{"model": str(located.path), "pretrained": row["weights"], "language": "en"} | row for row in rows]
    json_file.write(args.json, named)
    if located.run is not None and not args.no_append:
        appended = append_new(located.run, rows)
        print(
            f"{appended} of {len(rows)} rows appended to {located.run}/eval.jsonl"
            + ("" if appended == len(rows) else ": the others are there already")
        )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The numbers with their 95% intervals, and the most frequent mistakes."""
    cells = []
    for row in rows:
        for metric, value in row["metrics"].items():
            low, high = row.get("intervals", {}).get(metric, (None, None))
            between = "" if low is None else f"{low:.4f} - {high:.4f}"
            mark = " *" if metric == row.get("main_metric") and metric != "acc1" else ""
            cells.append(
                (
                    row["dataset"],
                    row["task"],
                    row["weights"],
                    row["step"],
                    metric + mark,
                    f"{value:.4f}",
                    between,
                    row["num_samples"],
                    row["images"],
                )
            )
    columns = ("data set", "task", "weights", "step", "metric", "value", "95% interval", "samples", "images")
    display.print_table(columns, cells)
    for row in rows:
        for pair in row.get("confusions", [])[:3]:
            print(
                display.printable(
                    f"{row['dataset']}, {row['weights']}: {pair['true']} taken for {pair['predicted']}"
                    f" {pair['count']} of {pair['of']} times"
                )
            )
