"""Plans a run before there is one: memory by part, what fits, speed, time, energy, money. Needs no data and no GPU.

  amclip plan aclip-vitb16 --gpus 8 --gpu h100
  amclip plan aclip-vitl16 --gpus 64 --gpu a100-80 h200 --samples 12423374 --json plan.json
  amclip plan aclip-vitb16 model.vision.name=vit_giant_patch14_clip_224 --gpus 512 --gpu h100 --explain
  amclip plan aclip-tiny --probe                      two steps here, measured against what was planned

Memory is what torch allocates at the peak, on the fullest GPU; `needs` adds the context and fragments. Speeds are this
trainer's own, measured on one GPU (docs/results/gpu-compiled.md, gpu-step.md); where none was measured there is no
number: --probe or --mfu give one.
"""

import argparse
from typing import Any

from amclip_ds import json_file
from amclip_ds.arguments import add_plugin, add_recipe, number, whole

HELP = "plan memory, time and cost of a run before there is one"
DEFAULT_GPU = "h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--gpus", type=whole(1, 1_000_000), default=1, metavar="N", help="GPUs in all (1)")
    parser.add_argument("--gpu", nargs="+", action="extend", metavar="NAME", help=f"kinds of GPU ({DEFAULT_GPU})")
    parser.add_argument("--gpus-per-node", type=whole(1, 1024), metavar="N", help="(8, or all where fewer)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of a GPU, as 80GB, in place of the kind's")
    parser.add_argument("--samples", type=whole(1), metavar="N", help="samples of an epoch (data.train's, or YFCC-15M)")
    parser.add_argument(
        "--text-tokens",
        type=whole(2, 1 << 16),
        metavar="N",
        help="tokens of a batch's longest text (the context length)",
    )
    parser.add_argument("--mfu", type=number(0.001, 1.0), metavar="F", help="your own share of the GPU's peak, as 0.3")
    parser.add_argument(
        "--bandwidth",
        type=number(0.001, 100_000),
        metavar="GB/s",
        help="what a GPU sends and receives in collectives (left out)",
    )
    parser.add_argument("--price", type=number(0.0), metavar="P", help="price of a GPU for an hour")
    add_plugin(parser)
    parser.add_argument("--explain", action="store_true", help="print the formulas with their numbers")
    parser.add_argument("--probe", action="store_true", help="measure steps of this configuration here")
    parser.add_argument("--json", metavar="FILE", help="also write the plan as JSON")


def run(args: argparse.Namespace) -> int:
    from amclip_ds import config, planning

    names = args.gpu or []
    args.overrides += [word for word in names if "=" in word]  # key=value words behind --gpu
    names = [word for word in names if "=" not in word] or [DEFAULT_GPU]
    settings = config.load(args.recipe, args.overrides, args.plugin)
    plans, measured = planning.plans(settings, args, names)
    from amclip_ds.plan import shown

    for index, plan in enumerate(plans):
        shown.show([*([""] if index else []), *shown.lines(plan, args.recipe)])
    if measured is not None:
        shown.show(["", *measured.lines()])
    if args.explain:
        shown.show(["", *shown.explain(plans[0])])
    content: dict[str, Any] = {"recipe": args.recipe, **plans[0].json()}
    content["by_gpu"] = {plan.ask.gpu.name: plan.json() for plan in plans}
    content["probe"] = None if measured is None else measured.json()
    json_file.write(args.json, content)
    return 0
