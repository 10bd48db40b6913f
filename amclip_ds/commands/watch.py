"""Evaluates each new valid checkpoint of a run, once, beside the training.

  amclip watch runs/aclip-vitb16 --data /eval/imagenet1k

Reads only committed checkpoints, pins each while it reads it, and appends to the run's eval.jsonl. Started again, it
resumes where it was. It ends when the run has ended and its last checkpoint is evaluated, or with --once.
"""

import argparse
from pathlib import Path

from amclip_ds.arguments import number, whole
from amclip_ds.commands.evaluate import SUITES

HELP = "evaluate each new checkpoint beside a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder; it may not exist yet")
    parser.add_argument("--data", action="append", metavar="DIR", help="what to evaluate on (the run's eval.data)")
    parser.add_argument("--suite", choices=SUITES, help="a suite's sets, below --data or in the hub's cache")
    parser.add_argument(
        "--weights", choices=("student", "teacher", "both"), default="both", help="which weights (both)"
    )
    parser.add_argument("--every-s", type=number(0.1), default=10.0, metavar="S", help="seconds between two polls (10)")
    parser.add_argument("--batch-size", type=whole(1), default=64, metavar="N", help="images in one forward (64)")
    parser.add_argument("--once", action="store_true", help="evaluate what is there now, then end")


def run(args: argparse.Namespace) -> int:
    from amclip_ds.evaluate.watch import watch

    data = args.data
    if args.suite:
        from amclip_ds.evaluate import suites

        found = suites.find(args.suite, args.data or [])
        for line in found.lines():
            print(line, flush=True)
        data = [str(folder) for folder in found.folders.values()]
    return watch(args.run_folder, data, args.weights, args.batch_size, args.every_s, args.once)
