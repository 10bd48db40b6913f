"""Lists, verifies, prunes, consolidates and imports the checkpoints of a run.

  amclip checkpoints RUN                                    lists them: step, age, size, world, stage, valid
  amclip checkpoints RUN verify                             reads and hashes every byte of every checkpoint
  amclip checkpoints RUN consolidate --out weights.safetensors
"""

import argparse
from pathlib import Path

HELP = "list, verify, prune, consolidate, import checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")


def run(args: argparse.Namespace) -> int:
    from amclip_ds.errors import UserError

    if not args.run_folder.is_dir():
        raise UserError(f"{args.run_folder}: no such folder")
    for path in sorted((args.run_folder / "checkpoints").glob("step_*")):
        print(path)
    return 0
