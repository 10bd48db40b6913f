"""The shards that data.train names, and what can be known of a run's data before torch is loaded."""

from pathlib import Path

from amclip_ds.data.config import DataConfig
from amclip_ds.errors import UserError
from amclip_ds.files import mode_at
from amclip_ds.shards.inputs import check_foreign, check_index_folder
from amclip_ds.shards.sources import expand_sources, scheme_of, split_sources


def training_sources(config: DataConfig) -> list[list[str]]:
    """The shards to train on, by source, as far as names and first bytes show. Raises UserError."""
    if not split_sources(config.train):
        raise UserError("data.train: give the shards to train on: a folder, a glob or '/data/{00000..00099}.tar'")
    found = expand_sources(config.train, "data.train", config.allow_pipe)
    if config.weights is not None and len(config.weights) != len(found):
        raise UserError(f"data.weights: {len(config.weights)} numbers for {len(found)} sources in data.train")
    for shard in (shard for shards in found for shard in shards if scheme_of(shard) == "pipe"):
        raise UserError(f"data.train: {shard!r}: a pipe has no offsets; write it to a file, or give the URL itself")
    return found


def training_shards(config: DataConfig) -> list[str]:
    """Those of all sources together. Raises UserError."""
    return [shard for shards in training_sources(config) for shard in shards]


def check_inputs(data: DataConfig, eval_data: str | None) -> None:
    """What can be known of a run's data before torch and DeepSpeed are loaded. Raises UserError."""
    training_sources(data)
    if data.index and not mode_at(Path(data.index) / "meta.json", f"data.index: {data.index}"):  # it will be made
        check_index_folder(Path(data.index), "data.index")
    for spec in split_sources(eval_data or ""):
        check_foreign(spec, "eval.data")
