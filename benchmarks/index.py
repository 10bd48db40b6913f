"""Half a million samples: how long an index takes to open and to be asked at any cursor, and the memory it needs.

python -m benchmarks.index
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from amclip_ds.data.order import EpochOrder, Mixture
from amclip_ds.shards.index import HAS_TEXT, RECORD, VERSION, Index, ShardEntry

SHARDS, PER_SHARD = 100, 5000


def write_index(folder: Path) -> None:
    """An index of samples that are nowhere."""
    keys = "".join(f"{number:09d}" for number in range(PER_SHARD)).encode()
    records = np.zeros(PER_SHARD, RECORD)
    records["image_block"], records["image_size"] = np.arange(PER_SHARD) * 120, 50_000
    records["flags"], records["key_offset"] = HAS_TEXT, 9 * np.arange(PER_SHARD)
    (folder / "samples.bin").write_bytes(records.tobytes() * SHARDS)
    (folder / "keys.bin").write_bytes(keys * SHARDS)
    entries = [
        vars(ShardEntry(f"/data/{n:05d}.tar", 1 << 30, 0, f"{n:016x}", PER_SHARD, [], len(keys))) for n in range(SHARDS)
    ]
    meta = {"version": VERSION, "samples": SHARDS * PER_SHARD, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))


def measure(folder: str) -> None:
    """In a process of its own: opens, seeks 200 cursors, prints."""
    import psutil

    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    index = Index(folder)
    opened = time.perf_counter() - began
    seeks = []
    for cursor in np.random.default_rng(0).integers(0, len(index) - 256, 200).tolist():
        began = time.perf_counter()
        order = EpochOrder(index.counts, Mixture(np.zeros(SHARDS, int), (1.0,)), 0, cursor % 7, 16, 8192)
        for shard, within, _ in order.locate(cursor, cursor + 256).tolist():
            index.sample(int(index.starts[shard]) + within)
        seeks.append(time.perf_counter() - began)
    grown = (psutil.Process().memory_info().rss - before) / 1e6
    bytes_a_sample = (Path(folder) / "samples.bin").stat().st_size / len(index)
    print(
        f"{len(index)} samples: opened in {1e3 * opened:.1f} ms; seek and 256 look-ups {1e3 * np.median(seeks):.1f} ms,"
        f" at most {1e3 * max(seeks):.1f}; {grown:.0f} MB resident; {bytes_a_sample:.0f} bytes a sample beside the keys"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        measure(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as made:
            write_index(Path(made))
            subprocess.run([sys.executable, "-m", __spec__.name, made], check=True)
