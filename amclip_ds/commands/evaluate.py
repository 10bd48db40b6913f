"""Evaluates a run, a checkpoint or an export: zero-shot classification, retrieval, linear probe, k-NN.

  amclip eval runs/aclip-vitb16 --data /eval/imagenet1k --data /eval/flickr30k
  amclip eval runs/aclip-vitb16 --data /eval/pets --task linear_probe --weights teacher
  amclip eval runs/aclip-vitb16/checkpoints/step_00010000 --data /eval/imagenet1k --templates openai-80 --procs 8
  amclip eval exported/open_clip --data /eval/imagenet1k --json numbers.json
  amclip eval runs/aclip-vitb16 --suite vtab+ --data /eval --csv vtab.csv --procs 8
  amclip eval runs/flip-tuned --data /eval/imagenet1k --keep-ratio 0.5

DIR is CLIP_benchmark's WebDataset layout, an image folder (a folder a class, wnids too, with train and val above them
or not), images beside a list of NAME,LABEL, tars of image and text for retrieval, or WinoGAViL's table with its
unpacked images; what was understood is printed.
The numbers are the same on any number of ranks (torchrun, srun, or --procs N). A run's numbers are also appended to its
eval.jsonl.
"""

import argparse
import sys
from pathlib import Path

from amclip_ds.arguments import share, whole

HELP = "evaluate a run, a checkpoint or an export"
SUITES = ("vtab+", "datacomp", "imagenet-shifts", "retrieval")
TASKS = ("zeroshot_classification", "retrieval", "association", "linear_probe", "knn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a run's folder, a checkpoint's, or an export's")
    parser.add_argument(
        "--data", action="append", metavar="DIR", help="what to evaluate on; repeatable (the run's eval.data)"
    )
    parser.add_argument(
        "--suite",
        choices=SUITES,
        help="evaluate on the sets of a suite: those below --data, or else in the hub's cache, as wds_NAME folders",
    )
    parser.add_argument(
        "--weights",
        choices=("student", "teacher", "both"),
        default="both",
        help="which weights (both; a source that has no teacher: the student)",
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=("auto", *TASKS),
        help="repeatable; auto (default): what the folder's dataset_type.txt says",
    )
    parser.add_argument(
        "--split",
        default="",
        metavar="NAME",
        help="the split's folder (test; where there is none, val); rows of another name their set `NAME split=...`",
    )
    parser.add_argument(
        "--templates",
        default="folder",
        metavar="folder|openai-7|openai-80|FILE",
        help="prompt templates (the folder's own; of an image folder openai-7, CLIP's 7 of 80); rows of others"
        " name their set `NAME templates=...`",
    )
    parser.add_argument(
        "--classnames",
        default="folder",
        metavar="folder|imagenet|FILE",
        help="class names (the folder's own; wnids are known); rows of others name their set `NAME classnames=...`",
    )
    parser.add_argument("--batch-size", type=whole(1), default=64, metavar="N", help="images in one forward (64)")
    parser.add_argument(
        "--preprocess",
        choices=("ours", "library"),
        default="ours",
        help="whose pixels an export sees: ours (default), or its own library's",
    )
    parser.add_argument(
        "--keep-ratio",
        type=share,
        default=1.0,
        metavar="R",
        help="encode a random share R of each image's patches (1: all); rows name their set `NAME keep=R`",
    )
    parser.add_argument("--procs", type=whole(1, 1024), metavar="N", help="start N processes on this machine")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers, in CLIP_benchmark's names")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write CLIP_benchmark's table")
    parser.add_argument("--no-append", action="store_true", help="do not append to the run's eval.jsonl")


def run(args: argparse.Namespace) -> int:
    from amclip_ds import files
    from amclip_ds.evaluate import source_kind
    from amclip_ds.shards.inputs import check_foreign

    if args.csv is not None:
        files.check_output(args.csv, "--csv", (b"model_fullname",))
    source_kind.check(args.source)
    for spec in () if args.suite else args.data or ():
        check_foreign(spec, "--data")
    if args.keep_ratio < 1:
        from amclip_ds.evaluate import token_removal

        token_removal.check(args.source, args.keep_ratio)
    if args.procs is not None:
        from amclip_ds.launch import run_ranks

        return run_ranks([sys.executable, "-m", "amclip_ds", *_without_procs(sys.argv[1:])], args.procs, None)
    from amclip_ds.evaluate.command import evaluate

    return evaluate(args)


def _without_procs(argv: list[str]) -> list[str]:
    kept, skip = [], False
    for word in argv:
        if skip or word == "--procs" or word.startswith("--procs="):
            skip = word == "--procs"
            continue
        kept.append(word)
    return kept
