"""Compares recipes under equal data, order and budget: trains each with each seed, then one table and one picture.

  amclip compare clip-tiny random2x-tiny aclip-tiny data.train=/data/cc eval.data=/data/ev --budget steps=900 --out cmp
  amclip compare clip-tiny aclip-tiny ... --budget flops=1e15 --out cmp       as many steps as the operations pay for
  amclip compare clip-tiny aclip-tiny ... --budget seconds=600 --out cmp      a step of each is timed first

A row with settings of its own is a yaml: `recipe: aclip-tiny` and what differs. Stopped, the same command resumes:
whole runs are read, an interrupted one is resumed; more seeds or recipes may be added. OUT has a folder a run,
compare.json, compare.txt and compare.png. Accuracy at equal time is read from each run's own
evaluations (eval.every_steps). Operations are those of the model, forward and backward: in table and picture as each
run counted them; for --budget flops= planned beforehand, the mean over masks' schedules and losses' starts, with every
text as long as the context, so that short captions spend less. On Slurm: slurm/compare.sbatch, a task a run.
"""

import argparse
from pathlib import Path

from amclip_ds import json_file
from amclip_ds.arguments import add_plugin, whole
from amclip_ds.errors import SettingsError

HELP = "train recipes under one budget and compare them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipes_or_settings", nargs="+", metavar="RECIPE|key=value", help="recipes, and settings that all have"
    )
    parser.add_argument("--seeds", type=whole(1, 1000), default=3, metavar="N", help="runs of each: seeds 0 to N-1 (3)")
    parser.add_argument(
        "--budget", required=True, metavar="UNIT=N", help="steps=, samples=, seconds= or flops= of each run"
    )
    parser.add_argument("--baseline", metavar="RECIPE", help="what the others are compared with (the first)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs and the table go")
    parser.add_argument("--procs", type=whole(1, 1024), default=1, metavar="N", help="processes of a run (1)")
    add_plugin(parser)
    parser.add_argument(
        "--task", type=whole(0, 99_999), metavar="I", help="train nothing: print the words of run I (compare.sbatch)"
    )
    parser.add_argument("--tasks", type=whole(1, 100_000), metavar="N", help="with it: how many tasks the array has")
    parser.add_argument("--ended", metavar="I=CODE", help="note how run I ended; after the last one the table comes")
    parser.add_argument("--json", metavar="FILE", help="also write rows and summary")


def run(args: argparse.Namespace) -> int:
    from amclip_ds.compare import array
    from amclip_ds.compare.compare import Comparison, compare
    from amclip_ds.compare.runs import read_budget, row_name

    recipes = [word for word in args.recipes_or_settings if "=" not in word]
    if not recipes:
        raise SettingsError("RECIPE: missing; `amclip recipes` lists them")
    ask = Comparison(
        recipes,
        [word for word in args.recipes_or_settings if "=" in word],
        args.seeds,
        read_budget(args.budget),
        args.baseline or row_name(recipes[0]),
        args.out,
        args.procs,
        args.plugin,
    )
    if args.task is not None:
        print(*array.words_of(ask, args.task, args.tasks or 0), sep="\n")
        return 0
    result, code = compare(ask) if args.ended is None else array.ended(ask, *array.read_ended(args.ended))
    if result:
        json_file.write(args.json, result)
    return code
