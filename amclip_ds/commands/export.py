"""Writes a model for another library, loads it back through that library, and keeps it only if it computes the same.

  amclip export runs/aclip-vitb16 --format open_clip --weights teacher --out exported/open_clip
  amclip export runs/aclip-vitb16 --format hf --weights student --out exported/hf
  amclip export runs/aclip-vitb16 --format timm --out exported/timm        the vision tower alone
  amclip export runs/aclip-vitb16 --format hf --out exported/hf --push my-lab/aclip-vitb16 --license cc-by-nc-4.0
  amclip export runs/aclip-vitb16 --format onnx --out exported/onnx        both towers as graphs

Embeddings of 64 real images and texts must agree within 1e-5 (--proof SHARDS; default: the run's own first training
shard, or made scenes where none is available). Cosine and largest difference are printed. A mismatch deletes the export
and exits with code 1.
"""

import argparse
from pathlib import Path

HELP = "write weights for open_clip, transformers, timm or ONNX, with proof"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a run's folder or a checkpoint's")
    parser.add_argument(
        "--format", choices=("open_clip", "hf", "timm", "onnx"), required=True, help="for which library"
    )
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="which weights (student)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--proof", metavar="SHARDS", help="tars with the images and texts to compare on")
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="of the weights, for the card (unknown: FILL IN)"
    )
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="then upload it to the Hugging Face hub (hf, open_clip); offline: the command that does it",
    )
    parser.add_argument("--private", action="store_true", help="as a private repository")
    parser.add_argument("--json", metavar="FILE", help="also write what the proof measured")


def run(args: argparse.Namespace) -> int:
    from amclip_ds.evaluate import source_kind

    source_kind.check(args.source)
    from amclip_ds.export.command import export

    return export(args)
