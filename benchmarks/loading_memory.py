"""Does loading leak? Loads without end and shows the resident memory of the run's process and its workers each minute.

python -m benchmarks.loading_memory --shards '/data/{00000..00009}.tar' --minutes 30 --workers 2
"""

import argparse
import time

import numpy as np
import psutil

from amclip_ds.data.config import DataConfig
from amclip_ds.data.loader import TrainingData

MIB = 2**20


def resident_mib(process: psutil.Process) -> list[float]:
    """MiB of the process itself and of each of its descendants, memory that is shared with others left out."""
    found = []
    for one in [process, *process.children(recursive=True)]:
        try:
            found.append(one.memory_full_info().uss / MIB)
        except psutil.Error:
            continue
    return found


def main() -> None:
    """Loads, and prints a row a minute, then the trend over the second half in MiB an hour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    data = TrainingData(
        DataConfig(train=args.shards, workers=args.workers),
        seed=0,
        global_batch=args.batch,
        rank=0,
        world_size=1,
        image_size=args.image_size,
        teacher_size=args.image_size,
        num_units=49,
        context_length=77,
    )
    process, began, reported, seen, rows = psutil.Process(), time.monotonic(), 0.0, 0, []
    for batch in data.batches(None):
        seen += len(batch.sample_ids)
        elapsed = time.monotonic() - began
        if elapsed - reported >= 60:
            reported = elapsed
            memory = resident_mib(process)
            rows.append((elapsed, sum(memory)))
            parts = " ".join(f"{part:.0f}" for part in memory)
            print(
                f"{elapsed / 60:.0f} min, epoch {batch.epoch}, {seen} samples: {sum(memory):.0f} MiB ({parts})",
                flush=True,
            )
        if elapsed >= 60 * args.minutes:
            break
    data.close()
    half = np.array(rows[len(rows) // 2 :])
    slope = np.polyfit(half[:, 0] / 3600, half[:, 1], 1)[0] if len(half) > 2 else float("nan")
    print(f"{seen / elapsed:.0f} samples/s; second half: {np.ptp(half[:, 1]):.1f} MiB apart, {slope:+.1f} MiB an hour")


if __name__ == "__main__":
    main()
