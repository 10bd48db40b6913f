"""Makes synthetic shards, trains a tiny A-CLIP and a control with random masks through DeepSpeed here, evaluates and
draws them.

  amclip demo --out out/demo

About 7 minutes on two cores. At the end it prints the accuracies on held-out scenes and says where everything is;
the numbers are in OUT/demo.json, the pictures in OUT/*.png.
"""

import argparse
from pathlib import Path

from amclip_ds.arguments import whole
from amclip_ds.errors import UserError

HELP = "the whole path in minutes: data, training, evaluation, pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder (default out/demo)")
    parser.add_argument("--steps", type=whole(1), default=900, help="optimizer steps of each run (default 900)")
    parser.add_argument("--scenes", type=whole(1), default=20000, help="training scenes (default 20000)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of both trainings (default 0); the scenes stay")
    parser.add_argument(
        "--procs", type=whole(1, 1024), default=None, help="processes (default: one per GPU, or one on a CPU)"
    )
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: a file; name an empty or new folder")
    from amclip_ds.demo import demo

    return demo(args.out, args.steps, args.scenes, args.procs, args.seed, args.setup_seconds)
