"""The order of samples: a pure function of (seed, epoch, position), the same for every world, worker count and restart.

An epoch visits its shards in a permuted order, `open_shards` at a time. From a group of open shards it takes windows:
the next run of consecutive samples of each, shuffled together. So a shard is read from front to back, while neighbours
in the order come from several shards. Position p of an epoch belongs to global batch p // global_batch.
"""

from dataclasses import dataclass

import numpy as np

from amclip_ds.keyed_random import keyed


@dataclass(frozen=True)
class Mixture:
    """How often each source's samples come in an epoch."""

    source_of_shard: np.ndarray
    """[shards] int"""
    weights: tuple[float, ...]
    """a source's samples per epoch over its size; 2.0: everything twice"""
    with_replacement: bool = False
    """True: whole shards are drawn at random (by weight) instead of visited in turn"""


@dataclass(frozen=True)
class _Run:
    """Samples [0, count) of a shard, for the copy-th time this epoch."""

    shard: int
    count: int
    copy: int


class EpochOrder:
    """One epoch's order. Cheap to make (milliseconds for 50,000 shards) and to ask at any position."""

    def __init__(
        self, counts: np.ndarray, mixture: Mixture, seed: int, epoch: int, open_shards: int, window: int
    ) -> None:
        """counts: [shards] samples of each. window: samples shuffled together, about."""
        self._seed, self._epoch = seed, epoch
        runs = _shards_of_epoch(counts, mixture, seed, epoch)
        self._groups = [runs[start : start + open_shards] for start in range(0, len(runs), open_shards)]
        sizes = np.array([sum(run.count for run in group) for group in self._groups], dtype=np.int64)
        self._windows_of_group = np.maximum(1, -(-sizes // window))
        self._group_starts = np.concatenate([[0], np.cumsum(sizes)])
        self.length = int(self._group_starts[-1])
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None

    def locate(self, start: int, stop: int) -> np.ndarray:
        """Positions [start, stop) -> [stop - start, 3] int64: shard, sample within the shard, copy."""
        parts = []
        while start < stop:
            group = int(np.searchsorted(self._group_starts, start, side="right")) - 1
            window, window_start, window_stop = self._window_at(group, start)
            rows = self._window(group, window)
            end = min(stop, window_stop)
            parts.append(rows[start - window_start : end - window_start])
            start = end
        return np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)

    def window_at(self, position: int) -> tuple[int, int]:
        """(group, window) that holds a position."""
        group = int(np.searchsorted(self._group_starts, position, side="right")) - 1
        return group, self._window_at(group, position)[0]

    def spans(self, group: int, window: int) -> list[tuple[int, int, int]]:
        """The runs a window reads: (shard, first sample, last + 1)."""
        return [(run.shard, first, last) for run, first, last in self._cuts(group, window) if last > first]

    def _cuts(self, group: int, window: int) -> list[tuple[_Run, int, int]]:
        """What a window takes of each open shard: (run, first, last + 1)."""
        total = int(self._windows_of_group[group])
        return [(r, r.count * window // total, r.count * (window + 1) // total) for r in self._groups[group]]

    def _window_at(self, group: int, position: int) -> tuple[int, int, int]:
        total, start = int(self._windows_of_group[group]), int(self._group_starts[group])
        counts = np.array([run.count for run in self._groups[group]], dtype=np.int64)
        edges = start + (counts[:, None] * np.arange(total + 1) // total).sum(0)
        window = int(np.searchsorted(edges, position, side="right")) - 1
        return window, int(edges[window]), int(edges[window + 1])

    def _window(self, group: int, window: int) -> np.ndarray:
        if self._cached is not None and self._cached[0] == (group, window):
            return self._cached[1]
        rows = np.concatenate(
            [
                np.stack([np.full(last - first, run.shard), np.arange(first, last), np.full(last - first, run.copy)], 1)
                for run, first, last in self._cuts(group, window)
            ]
        )
        rows = rows[keyed(self._seed, "window", self._epoch, group, window).permutation(len(rows))]
        self._cached = ((group, window), rows)
        return rows


def _shards_of_epoch(counts: np.ndarray, mixture: Mixture, seed: int, epoch: int) -> list[_Run]:
    """The shards of an epoch in visiting order, each with how many of its samples are taken."""
    if mixture.with_replacement:
        return _drawn_with_replacement(counts, mixture, seed, epoch)
    runs = []
    for source, weight in enumerate(mixture.weights):
        shards = np.flatnonzero(mixture.source_of_shard == source)
        wanted = round(weight * int(counts[shards].sum()))
        copy = 0
        while wanted > 0 and counts[shards].sum() > 0:
            for shard in keyed(seed, "part", epoch, source, copy).permutation(shards):
                count = min(int(counts[shard]), wanted)
                wanted -= count
                if count:
                    runs.append(_Run(int(shard), count, copy))
            copy += 1
    order = keyed(seed, "shards", epoch).permutation(len(runs))
    return [runs[i] for i in order]


def _drawn_with_replacement(counts: np.ndarray, mixture: Mixture, seed: int, epoch: int) -> list[_Run]:
    """Whole shards, drawn by their source's weight, until they hold an epoch's worth of samples.

    Not by their size: a large shard already gives more samples each time it is drawn.
    """
    chance = (counts > 0) * np.array(mixture.weights)[mixture.source_of_shard]
    wanted = int(counts.sum()) if chance.any() else 0
    random = keyed(seed, "replacement", epoch)
    copies = np.zeros(len(counts), dtype=np.int64)
    runs: list[_Run] = []
    while wanted > 0:
        for shard in random.choice(len(counts), size=len(counts), p=chance / chance.sum()).tolist():
            count = min(int(counts[shard]), wanted)
            if count:
                runs.append(_Run(shard, count, int(copies[shard])))
                copies[shard] += 1
                wanted -= count
    return runs
