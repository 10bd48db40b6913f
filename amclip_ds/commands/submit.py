"""Submits a recipe to Slurm, after checking what can be checked beforehand: recipe, batch, memory, shards.

  amclip submit aclip-vitb16 'data.train=/data/cc12m/{00000..01242}.tar' --nodes 4 --gpus-per-node 8 --time 24:00:00
  amclip submit aclip-vitb16 ... --dry-run           writes the script and the command, submits nothing
  amclip submit aclip-vitb16 ... --chain 3           three jobs, each continuing where the one before ended
  amclip submit aclip-vitb16 ... --sbatch=--cpus-per-gpu=12 --sbatch=--mem=480G --sbatch=--qos=low
  amclip submit --scripts slurm                      copies train.sbatch, eval.sbatch, ... there, for sbatch itself

The exact script and command are left in RUN/slurm. The last line printed is the job's id. Everything else about jobs:
slurm/README.md.
"""

import argparse
import re
from pathlib import Path

from amclip_ds import json_file
from amclip_ds.arguments import add_plugin, add_recipe, whole
from amclip_ds.errors import SettingsError

HELP = "check a recipe, then sbatch it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, nargs="?")
    parser.add_argument("--nodes", type=whole(1, 100_000), default=1, metavar="N", help="nodes (1)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--gpus-per-node",
        type=_gpus,
        metavar="[TYPE:]N",
        help="GPUs on each, a task for each GPU (as many as the partition's nodes have)",
    )
    size.add_argument("--tasks-per-node", type=whole(1, 1024), metavar="N", help="tasks on each node without GPUs (1)")
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU (amclip plan): refuses what cannot fit")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of a GPU, as 80GB: refuses what cannot fit")
    parser.add_argument("--time", type=_time, metavar="T", help="time limit of a job, as sbatch reads it")
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument("--chain", type=whole(1, 1000), default=1, metavar="K", help="submit K jobs, one after another")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="another sbatch flag; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="write the script and the command, submit nothing")
    parser.add_argument(
        "--scripts", type=Path, metavar="DIR", help="copy the job scripts to DIR, which is called slurm"
    )
    add_plugin(parser)
    parser.add_argument("--json", metavar="FILE", help="also write what was found and submitted")


def _gpus(text: str) -> str:
    """For `type=`: a number of GPUs, of a type if it is named, as sbatch reads it."""
    kind, colon, count = text.rpartition(":")
    if colon and not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z_.-][A-Za-z0-9_.-]*", kind):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs; as 4 or a100:4")
    return kind + colon + str(whole(1, 1024)(count))


def _time(text: str) -> str:
    """For `type=`: a time limit in one of the forms that sbatch reads."""
    if not re.fullmatch(r"[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED|INFINITE", text, re.I):
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit; as MINUTES, H:MM:SS or D-HH:MM:SS")
    return text


def run(args: argparse.Namespace) -> int:
    from amclip_ds import submit

    if args.scripts is not None:
        if args.recipe is not None:
            raise SettingsError("--scripts: copies files and submits nothing; leave the recipe out")
        for path in submit.copy_scripts(args.scripts):
            print(path)
        return 0
    if args.recipe is None:
        raise SettingsError("RECIPE: missing; `amclip recipes` lists them")
    plan = submit.make_plan(args)
    for line in plan.lines():
        print(line)
    jobs: list[int] = []
    try:
        if not args.dry_run:
            submit.submit(plan, jobs)
    finally:
        if jobs or args.dry_run:
            json_file.write(args.json, plan.facts() | {"jobs": jobs})
    dry = f"dry run: nothing submitted; bash {plan.folder}/submit.sh does it"
    print(dry if args.dry_run else " ".join(map(str, jobs)))
    return 0
