"""Trains a recipe: in one process, in N with --procs N, or under torchrun, deepspeed and srun.

  amclip train aclip-tiny data.train='/data/{00000..00099}.tar' run.steps=1000 --procs 2
  torchrun --nproc-per-node 4 -m amclip_ds train aclip-vitb16 data.train=/data/cc12m
  amclip recipes aclip-vitb16        what can be set, and what it means
  amclip train aclip-tiny ... --plugin mine.py mask.strategy=mine loss.mine.weight=1        docs/add-your-own.md

The last line printed is the run's folder. Started again with the same arguments, it resumes from its newest checkpoint.
"""

import argparse
import sys

from amclip_ds.arguments import add_training, plugin_words

HELP = "train a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training(parser)


def run(args: argparse.Namespace) -> int:
    from amclip_ds import config, preconditions
    from amclip_ds.launch import is_alone, is_first_rank, run_ranks
    from amclip_ds.resilience import preemption

    if args.procs is None:
        preemption.listen()  # before anything slow: no signal may be lost, or end what cannot save yet
    settings = config.load(args.recipe, args.overrides, args.plugin)
    if args.procs is not None or is_alone():
        preconditions.check(settings, args.resume)
    if args.procs is not None:
        config.plan_batch(settings.batch, args.procs)  # a mistake is reported once, not by every rank
        argv = ["train", args.recipe, *args.overrides, "--resume", args.resume, *plugin_words(args.plugin)]
        patience_s = settings.preemption.forced_exit_s + 30  # the ranks' own timers come first, and show their stacks
        return run_ranks(
            [sys.executable, "-m", "amclip_ds", *argv],
            args.procs,
            settings.run.out,
            forced_exit_s=patience_s,
            listens=True,
        )
    if is_first_rank():
        print(f"{args.recipe} -> {settings.run.out}: loading torch and DeepSpeed", flush=True)
    from amclip_ds.train import train

    return train(settings, resume=args.resume)
