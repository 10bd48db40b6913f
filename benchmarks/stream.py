"""The training stream of whichever `amclip_ds` Python finds: benchmarks/data.py runs this for ours and for another
checkout, whose rounds then take turns.

    PYTHONPATH=CHECKOUT python -P benchmarks/stream.py FOLDER

FOLDER holds shards. A word on its input is answered by a line: `decode` (256 JPEGs decoded, nothing else),
`stream` (some batches of three views at 224 px, without workers), `worker` (the same made by one worker process, its
time alone): CPU seconds a sample; `hash`: of what the first batches hold.
"""

import hashlib
import inspect
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import torch

from amclip_ds.data.config import DataConfig
from amclip_ds.data.loader import TrainingData

VIEW, BATCH = 224, 64
BATCHES = 4  # a round
PARTS = ("views_uint8", "teacher_uint8", "boxes", "photometric", "mask_noise", "token_ids", "sample_ids")


def open_data(folder: str, workers: int) -> TrainingData:
    """The stream of A-CLIP's two views and the teacher's crop. Older checkouts ask for what is a setting now."""
    asked = inspect.signature(TrainingData.__init__).parameters
    older = {"compat": "paper", "num_views": 2}
    return TrainingData(
        DataConfig(train=folder, workers=workers),
        seed=0,
        global_batch=BATCH,
        rank=0,
        world_size=1,
        image_size=VIEW,
        teacher_size=VIEW,
        num_units=49,
        context_length=77,
        say=lambda text: None,
        **{name: value for name, value in older.items() if name in asked},
    )


def taken(stream: Iterator[Any]) -> None:
    for _ in range(BATCHES):
        next(stream)


def decode(files: list[bytes]) -> float:
    began = time.thread_time()
    for content in files:
        simplejpeg.decode_jpeg(content)
    return (time.thread_time() - began) / len(files)


def without_workers(stream: Iterator[Any]) -> float:
    began = time.process_time()
    taken(stream)
    return (time.process_time() - began) / (BATCHES * BATCH)


def by_a_worker(stream: Iterator[Any]) -> float:
    before = idle_time()
    taken(stream)
    return (idle_time() - before) / (BATCHES * BATCH)


def idle_time() -> float:
    """CPU seconds of this process' children once they have made all that they were asked for."""
    seconds, last = -1.0, -2.0
    while seconds > last:
        time.sleep(0.5)
        last, seconds = seconds, sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
    return seconds


def hash_of(batches: list[Any]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in PARTS:
            part = getattr(batch, name)
            digest.update(np.ascontiguousarray(getattr(part, "table", part)))
    return digest.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    folder = sys.argv[1]
    with tarfile.open(min(Path(folder).glob("*.tar"))) as tar:
        photos = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
        files = [photo.read() for photo in photos[:256] if photo]
    streams: dict[str, Iterator[Any]] = {}
    for line in sys.stdin:
        word = line.strip()
        if word == "decode":
            answer: float | str = decode(files)
        elif word == "hash":
            first = open_data(folder, workers=0).batches()
            answer = hash_of([next(first) for _ in range(BATCHES)])
        else:
            if word not in streams:
                streams[word] = open_data(folder, workers=int(word == "worker")).batches()
                taken(streams[word])
            answer = (by_a_worker if word == "worker" else without_workers)(streams[word])
        print(answer, flush=True)


if __name__ == "__main__":
    main()
