"""What webdataset and accelerate would cost or save where this trainer has code of its own (docs/adr/0190).

python -m benchmarks.libraries [--samples 20000] [--repeats 5]

CPU seconds of this process, medians: times by the clock say little on a shared machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 1000


def median_cpu(work: Callable[[], Any], repeats: int) -> float:
    """CPU seconds of `work`."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def made(number: int) -> dict[str, Any]:
    content = np.random.default_rng(number).bytes(16_000)
    return {"__key__": f"{number:09d}", "jpg": b"\xff\xd8\xff" + content, "txt": f"a photo of {number}".encode()}


def write_with_webdataset(folder: Path, samples: int) -> None:
    from webdataset import ShardWriter

    with ShardWriter(f"{folder}/%05d.tar", maxcount=SHARD, verbose=0) as writer:
        for number in range(samples):
            writer.write(made(number))


def write_with_tarfile(folder: Path, samples: int) -> None:
    for first in range(0, samples, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, samples)):
                sample = made(number)
                for suffix in ("jpg", "txt"):
                    info = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                    info.size = len(sample[suffix])
                    tar.addfile(info, BytesIO(sample[suffix]))


def read_with_webdataset(folder: Path, until: int) -> int:
    """Samples of the plain pipeline, undecoded, up to a position: how it comes to that position too."""
    from webdataset import WebDataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    count = 0
    for _ in WebDataset(shards, shardshuffle=False, empty_check=False):
        count += 1
        if count == until:
            break
    return count


def read_by_index(folder: Path, index_folder: Path, start: int, stop: int) -> int:
    """The same members, in training's shuffled order, from any position."""
    from amclip_ds.data.order import EpochOrder, Mixture
    from amclip_ds.shards.index import Index
    from amclip_ds.shards.reader import ShardReader

    index, reader = Index(index_folder), ShardReader()
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    order = EpochOrder(index.counts, Mixture(np.zeros(len(shards), int), (1.0,)), 0, 0, 16, 8192)
    count = 0
    for at in range(start, stop, 64):
        places = order.locate(at, min(at + 64, stop)).tolist()
        samples = [(shards[shard], index.sample(int(index.starts[shard]) + within)) for shard, within, _ in places]
        wanted = [(shard, *place) for shard, sample in samples for place in (sample.image, sample.text) if place]
        reader.read(wanted)
        count += len(samples)
    return count


def cpu_of_import(module: str) -> float:
    program = f"import time\nimport torch\nb = time.process_time()\nimport {module}\nprint(time.process_time() - b)"
    return float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def towers(repeats: int) -> dict[str, float]:
    """A ViT-B/16 CLIP made to be filled from a file: with its parameters on `meta`, and filled with draws first."""
    from accelerate import init_empty_weights

    from amclip_ds import config
    from amclip_ds.model.amclip import AClip

    model = config.load("clip-vitb16", []).model

    def empty() -> None:
        with init_empty_weights():
            AClip(model)

    return {"empty_s": median_cpu(empty, repeats), "filled_s": median_cpu(lambda: AClip(model), repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from amclip_ds.shards.index import build_index

    n, row = args.samples, dict[str, Any](samples=args.samples, repeats=args.repeats)
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("webdataset", "tarfile", "index")}
        for folder in folders.values():
            folder.mkdir()
        row["making_the_bytes_s"] = median_cpu(lambda: [made(number) for number in range(n)], args.repeats)
        row["written_webdataset_s"] = median_cpu(lambda: write_with_webdataset(folders["webdataset"], n), args.repeats)
        row["written_tarfile_s"] = median_cpu(lambda: write_with_tarfile(folders["tarfile"], n), args.repeats)
        shards = folders["webdataset"]
        began = time.process_time()
        build_index([str(path) for path in sorted(shards.glob("*.tar"))], folders["index"] / "i", 1)
        row["indexed_once_s"] = time.process_time() - began
        index, far = folders["index"] / "i", 3 * n // 4
        row["read_webdataset_s"] = median_cpu(lambda: read_with_webdataset(shards, n), args.repeats)
        row["read_index_s"] = median_cpu(lambda: read_by_index(shards, index, 0, n), args.repeats)
        row["resumed_webdataset_s"] = median_cpu(lambda: read_with_webdataset(shards, far), args.repeats)
        row["resumed_index_s"] = median_cpu(lambda: read_by_index(shards, index, far, far + 64), args.repeats)
    row["import_webdataset_s"], row["import_accelerate_s"] = map(cpu_of_import, ("webdataset", "accelerate"))
    print(json.dumps(row | towers(args.repeats), indent=1))


if __name__ == "__main__":
    main()
