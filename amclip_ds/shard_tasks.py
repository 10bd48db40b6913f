"""Checks shards in several tasks of an array, each its slice, and joins their reports (slurm/data.sbatch)."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from amclip_ds.display import printable
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.files import read_json, write_atomically
from amclip_ds.shards import sources

SUMS = ("expected", "read", "skipped", "lost")


def slice_of(shards: list[str], index: int, count: int) -> list[str]:
    """The shards of one task: every `count`-th, so that a slow disk's or an odd source's shards are spread."""
    return shards[index::count]


def check(shards: str, out: Path, index: int, count: int, flags: list[str]) -> int:
    """Checks one slice and writes OUT/check-INDEX-of-COUNT.json; the last task to end joins all. Returns `data check`'s
    code: of the slice, or of the whole where it was the last.
    """
    from amclip_ds import cli

    if not 0 <= index < count:
        raise UserError(f"INDEX: {index} is none of {count} tasks: 0 to {count - 1}")
    found = sources.expand_shards(shards, "SHARDS", allow_pipe="--allow-pipe" in flags)
    mine = slice_of(found, index, count)
    if not mine:
        raise UserError(f"--array: {count} tasks for {len(found)} shard(s); take at most {len(found)}")
    out.mkdir(parents=True, exist_ok=True)
    report = report_file(out, index, count)
    report.unlink(missing_ok=True)
    partial = report.with_suffix(".part")
    code = cli.main(["data", "check", *mine, "--json", str(partial), *flags])
    if not partial.exists():
        return code
    partial.replace(report)
    reports = [report_file(out, number, count) for number in range(count)]
    if all(path.exists() for path in reports):  # of two that end together both write the same
        joined = join([read_json(path, dict, 1 << 30) for path in reports])
        write_atomically(out / "check.json", json.dumps(joined, indent=1) + "\n")
        numbers = ", ".join(f"{name} {joined[name]}" for name in SUMS)
        print(
            f"all {count} tasks: {len(joined['shards'])} shards, {numbers}: "
            f"{'submit' if joined['ok'] else 'do not submit'} ({out}/check.json)"
        )
        return 0 if joined["ok"] else 2
    return code


def join(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The reports of all slices as one. A duplicate in another slice is not seen: hashes are compared in each alone."""
    shards = sorted((shard for report in reports for shard in report["shards"]), key=lambda shard: shard["path"])
    sums = {name: sum(report[name] for report in reports) for name in SUMS}
    return {"shards": shards, **sums, "ok": all(report["ok"] for report in reports), "tasks": len(reports)}


def report_file(out: Path, index: int, count: int) -> Path:
    return out / f"check-{index}-of-{count}.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="shard_tasks", description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("index", type=int)
    parser.add_argument("count", type=int)
    args, flags = parser.parse_known_args(argv)
    try:
        return check(args.shards, args.out, args.index, args.count, flags)
    except AmclipError as error:
        print(printable(f"data.sbatch: {error}"))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
