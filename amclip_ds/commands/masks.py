"""Shows what each mask keeps of some images, as a run's training would: crops, scores, units, ratios.

  amclip masks runs/aclip-vitb16 --data '/data/cc12m/00000.tar' --out masks
  amclip masks runs/aclip-vitb16/checkpoints/step_00010000 --data scenes/test --out masks --mask attentive random

OUT gets masks.png (the grid, with its legend) and masks.html (the same, with a table and what each mask does). Where
the samples' json holds a `box` (top, left, height, width in pixels), the share of the object that each keeps is there.
"""

import argparse
from pathlib import Path
from typing import Any

from amclip_ds import json_file
from amclip_ds.arguments import add_plugin, whole

HELP = "show what each mask keeps of some images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a run's folder, or a checkpoint's")
    parser.add_argument(
        "--data", required=True, metavar="SHARDS", help="shards with the images, as data.train takes them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--images", type=whole(1, 256), default=8, metavar="N", help="how many images (8)")
    parser.add_argument("--mask", nargs="+", metavar="NAME", help="these masks alone (every one there is)")
    add_plugin(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    from amclip_ds import display, plugins
    from amclip_ds.errors import UserError
    from amclip_ds.evaluate import source_kind

    source_kind.check(args.source)
    from amclip_ds.masks import MASKS

    plugins.load(args.plugin)
    if unknown := [name for name in args.mask or () if name not in MASKS]:
        raise UserError(f"--mask {unknown[0]}: there are {', '.join(MASKS)}")
    from amclip_ds.pictures.mask_sheet import masks

    found = masks(args.source, args.data, args.out, args.images, args.mask or [])
    rows: list[tuple[Any, ...]] = []
    for name, facts in found["masks"].items():
        share = facts["object_share"]
        tokens = ", ".join(f"{count} of {found['patches']}" for count in facts["kept"])
        rows.append((name, tokens, "" if share is None else f"{share:.1%}"))
    display.print_table(("mask", "tokens kept, by view", "of the object"), rows)
    json_file.write(args.json, found)
    print(f"{args.out / 'masks.png'}\n{args.out / 'masks.html'}")
    return 0
