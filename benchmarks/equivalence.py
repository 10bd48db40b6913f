"""Prints the equivalence table (tests/distributed/equivalence.py): `python -m benchmarks.equivalence [--filter TEXT]`.

A line is 20 steps of aclip-tiny (1,000 token ids) on the same samples. Exit code 1 if a cell disagrees.
"""

import argparse
import itertools
import sys
import time

from tests.distributed import equivalence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filter", default="", help="only the cells whose name contains this")
    args = parser.parse_args()
    start, failed = time.monotonic(), 0
    print(
        f"{'cell':58} {'loss':>8} {'student':>8} {'teacher':>8} {'biases':>8} {'BN stat.':>8} {'flips':>5} {'gap':>8}"
    )
    cells = [cell for cell in equivalence.table() if args.filter in cell.name]
    for _, together in itertools.groupby(cells, lambda cell: (cell.ds, cell.world_size)):
        batch = list(together)
        for cell, found in zip(batch, equivalence.verdicts(batch)):
            complaints = equivalence.complaints(cell, found)
            failed += bool(complaints)
            values = (found.loss, found.student, found.teacher, found.biases, found.statistics)
            exact = " ".join(f"{value:8.1e}" for value in values)
            verdict = f"  FAILS: {'; '.join(complaints)} ({found.worst})" if complaints else ""
            print(f"{cell.name:58} {exact} {found.flips:5} {found.gap:8.1e}{verdict}", flush=True)
    spread = equivalence.seeds_spread()
    print(f"two seeds' losses in bf16 are {spread:.1e} apart (mean over steps): the tolerance of the bf16 cells")
    print(f"the median matrix of the fp32 reference moved by {equivalence.moved():.1%} of its norm")
    print(f"{len(cells)} cells, {failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
