"""data.exclude: samples that a run is to leave out, by their keys. Positions of the order stay; each is replaced.

A line of the file is KEY, or SHARD/KEY with the file name of one shard; # begins a comment line. Loads no torch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from posixpath import basename
from urllib.parse import urlsplit

from amclip_ds.errors import UserError
from amclip_ds.files import read_text
from amclip_ds.shards.sources import is_remote

MAX_FILE = 256 << 20


class Excluded:
    """The samples to leave out. Sent to loader workers whole."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = frozenset(lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, place: tuple[str, str]) -> bool:
        """place: (shard, key)."""
        shard, key = place
        return bool(self._lines) and (key in self._lines or f"{_file_name(shard)}/{key}" in self._lines)

    def count(self, shards: Iterable[tuple[str, Iterable[str]]]) -> tuple[int, int]:
        """(samples that are left out, lines that name none) of shards, each with its keys."""
        of_one: dict[str, set[str]] = defaultdict(set)
        for line in self._lines:
            name, _, key = line.partition("/")
            of_one[name].add(key)
        samples, used = 0, set[str]()
        for shard, keys in shards:
            name = _file_name(shard)
            named = of_one[name]
            for key in keys:
                if key in self._lines or key in named:
                    samples += 1
                    used |= self._lines & {key, f"{name}/{key}"}
        return samples, len(self) - len(used)

    @property
    def hash(self) -> str:
        """Of what is left out; empty: nothing is."""
        return hashlib.sha256("\n".join(sorted(self._lines)).encode()).hexdigest() if self._lines else ""


def _file_name(shard: str) -> str:
    """A shard's, without the signature behind a URL's."""
    return basename(urlsplit(shard).path if is_remote(shard) else shard)


def read_excluded(file: str | None) -> Excluded:
    """The samples that a file names; None: none. Raises UserError for a file that cannot be read, or names none."""
    if not file:
        return Excluded()
    try:
        lines = [line.strip() for line in read_text(Path(file), MAX_FILE).removeprefix("\ufeff").splitlines()]
    except UserError as error:
        raise type(error)(f"data.exclude: {error}") from None
    found = Excluded(line for line in lines if line and not line.startswith("#"))
    if not len(found):
        raise UserError(f"data.exclude: {file}: names no sample; a line is KEY, or SHARD/KEY")
    return found
