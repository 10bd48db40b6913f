"""The checkpoints of a run: lists, verifies, prunes, pins, consolidates, imports them.

amclip checkpoints RUN                            step, age, size, world, stage, valid (manifest and sizes)
amclip checkpoints RUN verify                     reads and hashes every byte; code 2 if one is damaged
amclip checkpoints RUN prune --keep-last 1        removes what is beyond the rules; --damaged, --set-aside: those too
amclip checkpoints RUN pin --step 5000            keeps one for good (unpin: no more)
amclip checkpoints RUN consolidate --out student.safetensors [--weights teacher] [--step 5000]
amclip checkpoints RUN import --source DIR [--tag T] --trust-pickle     from DeepSpeed's save_checkpoint
"""

import argparse
from pathlib import Path
from typing import Any

from amclip_ds import json_file, run_files
from amclip_ds.arguments import whole
from amclip_ds.errors import UserError

HELP = "list, verify, prune, consolidate, import checkpoints"
ACTIONS: dict[str, tuple[str, ...]] = {  # -> the options that each reads, beside --json
    "list": (),
    "verify": (),
    "prune": ("keep-last", "damaged", "set-aside"),
    "pin": ("step",),
    "unpin": ("step",),
    "consolidate": ("out", "weights", "step"),
    "import": ("source", "tag", "config", "trust-pickle"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("action", nargs="?", default="list", choices=ACTIONS, help="what to do (list)")
    parser.add_argument("--step", type=whole(0), metavar="N", help="pin, unpin, consolidate: which (newest whole one)")
    parser.add_argument(
        "--keep-last", type=whole(1), metavar="K", help="prune: in place of the run's checkpoint.keep_last"
    )
    parser.add_argument("--damaged", action="store_true", help="prune: damaged checkpoints too")
    parser.add_argument("--set-aside", action="store_true", help="prune: also what resumes set aside")
    parser.add_argument("--weights", choices=("student", "teacher"), help="consolidate: whose (student)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="consolidate: the safetensors file to write")
    parser.add_argument("--source", type=Path, metavar="DIR", help="import: a folder of DeepSpeed's save_checkpoint")
    parser.add_argument("--tag", metavar="T", help="import: which of its tags (what its `latest` names)")
    parser.add_argument("--config", metavar="FILE", help="import: recipe or yaml of the run (RUN/config.yaml)")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="import: run the code pickled in the folder; without it nothing is read",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")


def run(args: argparse.Namespace) -> int:
    check_options(args)
    from amclip_ds import stored_checkpoints

    checkpoints = stored_checkpoints.folder_of(args.run_folder, is_new=args.action == "import")
    if args.action in ("list", "verify"):
        rows = stored_checkpoints.rows(checkpoints, deep=args.action == "verify")
        _print_table(rows, checkpoints)
        json_file.write(args.json, rows)
        return 2 if args.action == "verify" and not all(row["valid"] for row in rows) else 0
    if args.action == "prune":
        removed = stored_checkpoints.prune(checkpoints, _rules(args, checkpoints), args.damaged, args.set_aside)
        result: dict[str, Any] = {"removed": [str(path) for path in removed]}
        print("\n".join(f"removed {path}" for path in removed) or "nothing to remove")
    elif args.action in ("pin", "unpin"):
        path = stored_checkpoints.choose(checkpoints, args.step)
        stored_checkpoints.pin(path, args.action == "pin")
        result = {"path": str(path), "pinned": args.action == "pin"}
        print(f"{'keeps' if args.action == 'pin' else 'no more keeps'} {path}")
    elif args.action == "consolidate":
        result = _consolidate(args, checkpoints)
    else:
        result = _import(args, checkpoints)
    json_file.write(args.json, result)
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for an option that the action does not read: it was meant to change what is done."""
    own = ACTIONS[args.action]
    for option in dict.fromkeys(name for names in ACTIONS.values() for name in names):
        given = getattr(args, option.replace("-", "_"))
        if option in own or given is None or given is False:
            continue
        readers = [action for action, names in ACTIONS.items() if option in names]
        by = f"it goes by --{', --'.join(own)}" if own else f"{', '.join(readers)} {'do' if readers[1:] else 'does'}"
        raise UserError(f"--{option}: {args.action} does not read it; {by}")


def _print_table(rows: list[dict[str, Any]], checkpoints: Path) -> None:
    from amclip_ds import display

    cells = []
    for row in rows:
        known = row["age_s"] is not None
        cells.append(
            (
                row["step"],
                display.duration(row["age_s"]) if known else "?",
                f"{row['bytes'] / 1e6:.1f} MB" if known else "?",
                row["world_size"] or "?",
                "?" if row["stage"] is None else row["stage"],
                row["precision"] or "?",
                "yes" if row["pinned"] else "",
                "yes" if row["valid"] else "NO",
            )
        )
    columns = ("step", "age", "size", "world", "stage", "precision", "pinned", "valid")
    display.print_table(columns, cells, title=str(checkpoints))
    for row in rows:
        if row["problem"]:
            print(f"damaged: {row['problem']}")


def _rules(args: argparse.Namespace, checkpoints: Path) -> Any:
    """The run's own rules, however it was named, with what the command line says instead."""
    from dataclasses import replace

    from amclip_ds import config
    from amclip_ds.checkpoint import CheckpointConfig

    file = checkpoints.absolute().parent / run_files.CONFIG
    rules = config.load_run(file).checkpoint if file.is_file() else CheckpointConfig()
    try:
        return replace(rules, keep_last=args.keep_last) if args.keep_last is not None else rules
    except ValueError as error:
        raise UserError(f"--keep-last: {error}") from None


def _consolidate(args: argparse.Namespace, checkpoints: Path) -> dict[str, Any]:
    from amclip_ds import files, stored_checkpoints

    if args.out is None:
        raise UserError("consolidate: --out FILE is missing")
    files.check_output(args.out, "--out", (b"{",), at=8)  # a safetensors file: its header's length, then JSON
    path = stored_checkpoints.choose(checkpoints, args.step)
    weights = args.weights or "student"
    num_bytes = stored_checkpoints.consolidate(path, args.out, weights)
    print(f"{args.out}: the {weights} of {path.name}, {num_bytes / 1e6:.1f} MB")
    return {"out": str(args.out), "weights": weights, "checkpoint": str(path), "bytes": num_bytes}


def _import(args: argparse.Namespace, checkpoints: Path) -> dict[str, Any]:
    from amclip_ds import config, stored_checkpoints

    if args.source is None:
        raise UserError("import: --source DIR is missing: a folder of DeepSpeed's save_checkpoint")
    if not args.trust_pickle:
        raise UserError(
            f"import: {args.source} is pickled, and reading it runs whatever code its writer put in it;"
            f" --trust-pickle says that you trust its writer"
        )
    recipe = args.config or str(args.run_folder / run_files.CONFIG)
    path, notes = stored_checkpoints.import_deepspeed(args.source, args.tag, checkpoints, config.load(recipe))
    print("\n".join([*notes, str(path)]))
    return {"checkpoint": str(path), "notes": notes}
