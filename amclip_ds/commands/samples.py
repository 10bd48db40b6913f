"""The samples of a step of a run, found again from its number: shard, offset, key, caption, crops; and their losses.

  amclip samples runs/aclip-vitb16 1200                     the first 32 of the batch
  amclip samples runs/aclip-vitb16 1200 --worst 10 --out worst.html      the largest losses, with their pictures
  amclip samples runs/aclip-vitb16 1200 --json step.json    all of them

Nothing is searched: the order of data is a function of seed and step. The shards must be there (or data.train=... names
where) and those that the run had, by the hash in its checkpoints. Losses are of the whole batch, both directions, every
token kept, by the run's newest checkpoint or weights.
"""

import argparse
from pathlib import Path

from amclip_ds import files, json_file
from amclip_ds.arguments import whole

HELP = "show the samples of a step of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("step", type=whole(1, 10**12), metavar="STEP", help="the step, from 1")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="where its files are here (data.train=...)"
    )
    parser.add_argument("--worst", type=whole(1), metavar="N", help="the N samples with the largest loss")
    parser.add_argument("--most", type=whole(1), default=32, metavar="N", help="shown without --worst (32)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="a page with their pictures")
    parser.add_argument("--json", metavar="FILE", help="also write all of the batch as JSON")


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        files.check_output(args.out, "--out", (b"<",))
    from amclip_ds import samples

    shown = samples.of_step(args.run_folder, args.step, args.overrides, has_losses=args.worst is not None)
    chosen = shown.worst(args.worst) if args.worst is not None else shown.rows[: args.most]
    for line in samples.lines(shown, chosen):
        print(line)
    if args.out is not None:
        samples.write_page(shown, chosen, args.out)
        print(args.out)
    json_file.write(args.json, shown.json())
    return 0
