"""The samples of any step of a run, found again from its number: the order of data is a pure function of it."""

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from amclip_ds import config as settings
from amclip_ds import run as runs
from amclip_ds import run_files
from amclip_ds.config import TrainConfig
from amclip_ds.data import captions
from amclip_ds.data.batch import Batch
from amclip_ds.data.keyed_random import keyed
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.order import EpochOrder
from amclip_ds.data.reader import ShardReader
from amclip_ds.engine.runtime import Runtime
from amclip_ds.errors import UserError
from amclip_ds.method import method_of

ALONE = Runtime(0, 1, 0, 1, 1, 0, torch.device("cpu"), "alone", True)


@dataclass(frozen=True)
class Looked:
    """A sample of a step."""

    place: int
    """in the global batch"""
    sample_id: int
    key: str
    shard: str
    offset: int
    """of its image in the shard, in bytes"""
    caption: str
    """the one that was drawn"""
    image: bytes
    """its member, as it lies in the shard"""
    is_replacement: bool
    """it stands in for one that cannot be used"""


def config_of(run: Path) -> TrainConfig:
    """The settings of a run, for reading its data here. Raises UserError."""
    if not (run / run_files.CONFIG).is_file():
        raise UserError(f"{run}: not a run's folder: it has no config.yaml")
    return for_reading(settings.load_run(run / run_files.CONFIG), run)


def for_reading(config: TrainConfig, run: Path) -> TrainConfig:
    """The same settings, with data that this process reads by itself; an index is looked for in the run's folder."""
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, out=str(run)),
        data=dataclasses.replace(config.data, workers=0, stage_dir=""),
    )


@contextmanager
def opened(config: TrainConfig) -> Iterator[TrainingData]:
    """The training data of a run, whole batches on one rank. Raises UserError where they are not there."""
    with closing(runs.open_data(config, method_of(config), ALONE)) as data:
        yield data


def place_of(data: TrainingData, step: int) -> tuple[int, int]:
    """(epoch, batch within it) of a step, which are counted from 1."""
    return divmod(step - 1, data.steps_per_epoch)


def batch_of(data: TrainingData, step: int) -> Batch:
    """The global batch of a step, as it was trained on."""
    epoch, batch = place_of(data, step)
    stream = data.batches({"epoch": epoch, "step": batch})
    return next(iter(stream))


def members_of(data: TrainingData, config: TrainConfig, step: int, ids: list[int] | None = None,
               most: int | None = None) -> list[Looked]:  # fmt: skip
    """The samples of a step with what lies in the shards, read but not decoded.

    ids: of the batch as it was made (with replacements); None: those of the order. most: only the first so many.
    """
    epoch, batch = place_of(data, step)
    start = batch * data.global_batch
    count = min(data.global_batch, most or data.global_batch)
    rows = _order(data, epoch).locate(start, start + count)
    index, spec = data.index, data._spec
    asked = [int(index.starts[spec.members[int(shard)]]) + int(within) for shard, within, _ in rows]
    ids = asked if ids is None else ids[:count]
    paths = {number: path for path, number in zip(spec.paths, spec.members)}
    starts = index.starts
    found = []
    with closing(ShardReader()) as reader:
        for place, sample_id in enumerate(ids):
            sample = index.sample(sample_id)
            shard = paths[int(starts.searchsorted(sample_id, side="right")) - 1]
            parts = (sample.image, sample.text, sample.json)
            contents = iter(reader.read_many(shard, [part for part in parts if part]))
            image, text, fields = (next(contents) if part else None for part in parts)
            is_other = sample_id != asked[place]
            copy: int | str = f"instead of {start + place}" if is_other else int(rows[place][2])
            random = keyed(spec.seed, "sample", epoch, sample_id, copy)
            options = captions.candidates(text, fields, spec.sources, spec.per_line)
            found.append(Looked(
                place, sample_id, sample.key, shard, sample.image[0], captions.choose(options, random), image or b"",
                is_other,
            ))  # fmt: skip
    return found


def _order(data: TrainingData, epoch: int) -> EpochOrder:
    spec = data._spec
    return EpochOrder(
        data.index.counts[list(spec.members)], spec.mixture, spec.seed, epoch, spec.open_shards, spec.window
    )
