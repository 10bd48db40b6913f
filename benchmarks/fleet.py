"""What a start, a save and a resume ask of a shared file system and of the other ranks, at 2 to 16 ranks, and at 1,024
if it grows on like this: real gloo ranks here, two a node by name, operations counted and not timed.

    python -m benchmarks.fleet --ranks 2 4 8 16 --at 1024

A row a phase and kind of operation: its count on rank 0 and the most on any other rank, by number of ranks; how it
grows from one number of ranks to the next doubling; and the count at --at by a line through the two largest.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from amclip_ds.data import synthetic
from tests.harness import run_ranks

KINDS = ("looks", "opens", "changes", "collectives", "object_bytes")
PHASES = ("start", "save", "resume")
Counts = dict[str, dict[str, int]]  # phase -> kind -> how often


def count(world_size: int, folder: Path) -> list[Counts]:
    """By rank: the counts of a run of two steps and a save, and of the start of one that continues it."""
    synthetic.write_dataset(folder / "data", num_train=128, num_test=0, image_size=64, shard_size=32, workers=1)
    case, shared = "tests.distributed.cases_fleet:counted_run", str(folder)
    begun = run_ranks(case, world_size, timeout_s=1800, shared=shared, phase="start", steps=2)
    continued = run_ranks(case, world_size, timeout_s=1800, shared=shared, phase="resume", steps=3)
    return [one | {"resume": other["resume"]} for one, other in zip(begun, continued)]


def row(by_rank: list[Counts], phase: str, kind: str) -> tuple[int, int]:
    """(on rank 0, the most on another)."""
    of = [counts[phase].get(kind, 0) for counts in by_rank]
    return of[0], max(of[1:])


def extrapolated(sizes: list[int], counts: list[int], at: int) -> float:
    """The line through the last two, at `at`."""
    (x, y), (last_x, last_y) = zip(sizes[-2:], counts[-2:])
    return last_y + (last_y - y) / (last_x - x) * (at - last_x) if (x, y) != (last_x, last_y) else float(y)


def table(found: dict[int, list[Counts]], at: int) -> list[dict[str, Any]]:
    """A row a phase, kind and place."""
    sizes, rows = sorted(found), []
    for phase in PHASES:
        for kind in KINDS:
            pairs = [row(found[size], phase, kind) for size in sizes]
            for place, counts in (("rank 0", [one for one, _ in pairs]), ("another", [other for _, other in pairs])):
                rows.append(
                    {
                        "phase": phase,
                        "kind": kind,
                        "on": place,
                        "counts": dict(zip(sizes, counts)),
                        "at": round(extrapolated(sizes, counts, at)) if len(sizes) > 1 else None,
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--at", type=int, default=1024)
    parser.add_argument("--json", help="also write the rows there")
    args = parser.parse_args()
    found = {}
    for world_size in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            found[world_size] = count(world_size, Path(folder))
        print(f"{world_size} ranks: done", file=sys.stderr, flush=True)
    rows = table(found, args.at)
    print(f"{'phase':8}{'what':14}{'on':9}" + "".join(f"{size:>10}" for size in sorted(found)) + f"{args.at:>12}")
    for one in rows:
        print(
            f"{one['phase']:8}{one['kind']:14}{one['on']:9}"
            + "".join(f"{n:>10,}" for n in one["counts"].values())
            + f"{one['at']:>12,}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
