"""`amclip export`: writes beside the target, proves, and only then gives the folder its name."""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from amclip_ds import json_file
from amclip_ds.errors import AmclipError, UserError, in_one_line
from amclip_ds.evaluate.libraries import open_library
from amclip_ds.evaluate.source import Located, build_towers, locate
from amclip_ds.export import hugging_face, onnx, open_clip, push, timm
from amclip_ds.export.card import UNKNOWN, check_license, write_card
from amclip_ds.export.proof import ExportMismatch, Proof, gather_samples, prove
from amclip_ds.files import not_written
from amclip_ds.model.amclip import AClip

WRITERS = {"open_clip": open_clip.write, "hf": hugging_face.write, "timm": timm.write, "onnx": onnx.write}


def export(args: argparse.Namespace) -> int:
    """Returns 0; raises UserError (code 2) for a wrong request, ExportMismatch (1) for what computes otherwise."""
    located = locate(args.source)
    if located.config is None:
        raise UserError(f"{args.source}: an export already; export from a run or a checkpoint")
    if args.out.exists():
        raise UserError(f"--out {args.out}: exists; name a folder that does not, or remove it")
    if args.push:
        push.check(args.push, args.format)
    check_license(args.license)
    module = build_towers(located, args.weights)
    proof = write_proved(args.format, module, located, args.weights, args.out, args.proof, args.license, args.push)
    for line in proof.lines():
        print(line)
    json_file.write(args.json, proof.facts())
    if args.push:
        print(push.push(args.out, args.push, args.private))
    print(args.out)
    return 0


def write_proved(
    fmt: str,
    module: AClip,
    located: Located,
    weights: str,
    out: Path,
    proof_shards: str | None,
    license_id: str = UNKNOWN,
    hub_name: str | None = None,
) -> Proof:
    """Makes the folder `out`, whole and proved, or nothing. Raises ExportMismatch, UserError, AmclipError."""
    assert located.config is not None
    config = located.config
    samples = gather_samples(proof_shards, config)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        WRITERS[fmt](partial, module, config.model)
        proof = prove(module, config.model, load_back(partial, fmt, weights), samples)
        if not proof.holds:
            raise ExportMismatch("\n".join(["the export computes otherwise and was deleted:", *proof.lines()]))
        (partial / "README.md").write_text(write_card(fmt, located, weights, proof, license_id, hub_name))
        facts = {"step": located.step, "weights": weights, "format": fmt, "proof": proof.facts()}
        (partial / "amclip.json").write_text(json.dumps(facts, indent=1) + "\n")
        partial.rename(out)
    except OSError as error:
        raise not_written(f"--out {out}:", error) from None
    except SafetensorError as error:  # how it reports the disk's errors
        raise AmclipError(f"--out {out}: cannot be written: {in_one_line(error, 300)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return proof


def load_back(folder: Path, fmt: str, weights: str) -> object:
    """The export as its library loads it. Raises ExportMismatch where the library refuses it."""
    try:
        return open_library(folder, fmt, weights, torch.device("cpu"))
    except Exception as error:  # if the library raises anything, the export is useless
        reason = in_one_line(error, 300)
        raise ExportMismatch(
            f"{fmt} does not load the export, which was deleted: {type(error).__name__} {reason}"
        ) from error
