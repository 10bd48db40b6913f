"""SHARDS as a person writes them: a folder, a glob, braces, several joined by `::`; local paths, URLs, `pipe:`."""

import glob
from pathlib import Path

import braceexpand

from amclip_ds.errors import UserError


def is_remote(shard: str) -> bool:
    """True for a URL (http, https, s3, gs, ...) and for `pipe:`."""
    return "://" in shard or shard.startswith("pipe:")


def split_sources(spec: str) -> list[str]:
    """The parts that `::` joins."""
    return [part for part in spec.split("::") if part]


def expand_shards(spec: str, key: str = "data.train", allow_pipe: bool = False) -> list[str]:
    """Every shard of all sources that `::` joins, in order. Raises UserError."""
    return [shard for source in split_sources(spec) for shard in expand(source, key, allow_pipe)]


def expand(spec: str, key: str = "data.train", allow_pipe: bool = False) -> list[str]:
    """Every shard of one source, in order. Raises UserError, naming the key and the first shard that is missing."""
    if spec.startswith("pipe:"):
        if not allow_pipe:
            raise UserError(f"{key}: {spec!r} runs a shell command; data.allow_pipe=true allows it")
        return list(braceexpand.braceexpand(spec))
    try:
        written = list(braceexpand.braceexpand(spec))
    except ValueError as error:
        raise UserError(f"{key}: {spec!r}: {error}") from None
    shards = [shard for part in written for shard in _expand_path(part, key)]
    if not shards:
        raise UserError(f"{key}: {spec!r} names no shard")
    return shards


def _expand_path(part: str, key: str) -> list[str]:
    if is_remote(part):
        return [part]
    path = Path(part)
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*.tar") if not file.name.startswith("."))
        if not found:
            raise UserError(f"{key}: no .tar file in the folder {part}")
        return found
    if glob.has_magic(part) and not path.exists():
        found = sorted(glob.glob(part, recursive=True))
        if not found:
            raise UserError(f"{key}: {part!r} matches no file")
        return found
    if not path.is_file():
        raise UserError(f"{key}: no such shard: {part}")
    return [part]
