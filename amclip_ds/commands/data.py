"""Makes synthetic shards.

amclip data synth --out scenes --train 20000 --test 2048     a small data set to try everything on
"""

import argparse
from collections.abc import Callable
from pathlib import Path

HELP = "make synthetic shards; index, check and count real ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    synth = _add(actions, "synth", "make shards of synthetic scenes", SYNTH, _synth)
    synth.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    synth.add_argument("--train", type=int, default=20000, metavar="N", help="training scenes (default 20000)")
    synth.add_argument("--test", type=int, default=2048, metavar="N", help="held-out scenes (default 2048)")
    synth.add_argument("--image-size", type=int, default=64, metavar="PX", help="side in pixels (default 64)")
    synth.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default 0)")
    synth.add_argument("--shard-size", type=int, default=1000, metavar="N", help="scenes a tar (default 1000)")
    synth.add_argument("--coloured-distractors", action="store_true", help="colour the clutter too (a control)")
    synth.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")


def run(args: argparse.Namespace) -> int:
    return args.act(args)


SYNTH = """Makes cluttered scenes with one captioned object each: 8 shapes x 8 colours, so chance is 1/64.

  amclip data synth --out scenes
  amclip train aclip-tiny data.train=scenes/train eval.data=scenes

The same arguments give the same bytes on every machine. DIR holds train/*.tar and, in CLIP_benchmark's layout, test/
with classnames.txt and templates; each sample is key.jpg, key.txt, key.cls and key.json with the object's box.
"""


def _add(
    actions: argparse._SubParsersAction, word: str, short: str, text: str, act: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        word, help=short, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(act=act)
    return parser


def _synth(args: argparse.Namespace) -> int:
    from amclip_ds.data import synthetic

    made = synthetic.write_dataset(
        args.out, args.train, args.test, args.image_size, args.seed, shard_size=args.shard_size,
        coloured_distractors=args.coloured_distractors, workers=args.workers,
    )  # fmt: skip
    done = "made" if made else "stand already"
    print(f"{args.train} training and {args.test} held-out scenes {done}")
    print(args.out)
    return 0
