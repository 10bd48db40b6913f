"""Trains a recipe: in one process, in N with --procs N, or under torchrun, deepspeed and srun.

  amclip train aclip-tiny data.train='/data/{00000..00099}.tar' run.steps=1000 --procs 2
  torchrun --nproc-per-node 4 -m amclip_ds train aclip-vitb16 data.train=/data/cc12m
  amclip recipes aclip-vitb16        what can be set, and what it means
  amclip train aclip-tiny ... --plugin mine.py mask.strategy=mine loss.mine.weight=1        docs/add-your-own.md

The last line printed is the run's folder. Started again with the same arguments, it resumes from its newest checkpoint.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from amclip_ds.arguments import add_training, plugin_words
from amclip_ds.errors import UserError

if TYPE_CHECKING:
    from amclip_ds.config import TrainConfig

HELP = "train a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training(parser)


def run(args: argparse.Namespace) -> int:
    from amclip_ds import config, preconditions
    from amclip_ds.launch import hold_signals_back, is_alone, is_first_rank, is_under_srun
    from amclip_ds.resilience import preemption

    if args.max_restarts is not None and args.procs is None:
        raise UserError("--max-restarts: it is the launcher of --procs N that restarts; add --procs, or leave it out")
    if args.max_restarts and args.resume != "auto":
        raise UserError(
            f"--max-restarts: a restart continues from the newest checkpoint, not with --resume {args.resume}"
        )
    # Before anything slow: no signal may be lost, or end what cannot save yet.
    if args.procs is None:
        preemption.listen(leaves_early=is_under_srun())
    else:
        hold_signals_back()
    settings = config.load(args.recipe, args.overrides, args.plugin)
    if args.procs is not None or is_alone():
        preconditions.check(settings, args.resume)
    if args.procs is not None:
        config.plan_batch(settings.batch, args.procs)  # a mistake is reported once, not by every rank
    elif is_first_rank():
        say_loading(args.recipe, settings)
    if args.procs is not None and (code := launch(args, settings)) is not None:
        return code
    from amclip_ds.train import train

    return train(settings, resume=args.resume)


def launch(args: argparse.Namespace, settings: "TrainConfig") -> int | None:
    """Starts the ranks and follows them. Returns the exit code; in a rank that is a fork of this process, None."""
    from amclip_ds.launch import has_gpu, train_ranks
    from amclip_ds.resilience import preemption

    forks = not has_gpu()
    if forks:
        say_loading(args.recipe, settings)
    argv = ["train", args.recipe, *args.overrides, "--resume", args.resume, *plugin_words(args.plugin)]
    code = train_ranks(
        [sys.executable, "-m", "amclip_ds", *argv],
        args.procs,
        settings.run.out,
        forced_exit_s=settings.preemption.forced_exit_s + 30,  # the ranks' own timers come first, and show their stacks
        max_restarts=args.max_restarts or 0,
        import_ahead=import_ahead if forks else None,
    )
    if code is None:
        if settings.data.workers:
            from amclip_ds.data.workers import fork_worker_server

            fork_worker_server()  # before there are threads
        preemption.listen()
    return code


def import_ahead() -> None:
    """What ranks and their loaders' workers import on their way to a first step, for those that are forks."""
    import amclip_ds.data.worker_imports
    import amclip_ds.train  # noqa: F401
    from amclip_ds.engine.light_imports import import_on_the_cpu

    import_on_the_cpu()


def say_loading(recipe: str, settings: "TrainConfig") -> None:
    print(f"{recipe} -> {settings.run.out}: loading torch and DeepSpeed", flush=True)
