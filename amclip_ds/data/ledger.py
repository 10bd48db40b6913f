"""What became of the samples: read, skipped, damaged, by shard and cause; and when too many are lost to continue."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds.data.batch import Batch
from amclip_ds.errors import RunStopped, UserError
from amclip_ds.jsonl import each
from amclip_ds.shards.account import MIN_SKIPS_TO_STOP, Account

Gather = Callable[[Any], list[Any]]
SKIPPED = "replaced"  # the action of an incident that cost a sample its place
LISTED = 16  # incidents of a shard and kind, over all ranks: later ones are listed in the first epoch alone
BLOCK = 1 << 16  # samples after which what was read long ago is forgotten by the rate


@dataclass
class Counts:
    """Sums over some samples; they add up over ranks."""

    seen: int = 0
    """places in batches, each filled with a sample"""
    skipped: int = 0
    """samples that could not be used in their place"""
    damaged: int = 0
    """of `seen`: images of damaged files, decoded all the same"""
    retried: int = 0
    read_bytes: int = 0
    by_shard_and_kind: Counter[tuple[str, str]] = field(default_factory=Counter)
    """what was skipped"""
    incidents: Counter[tuple[str, str]] = field(default_factory=Counter)
    """by shard and kind, whatever was done about them"""

    @property
    def tried(self) -> int:
        """Samples checked: each place's own, and every one that was to replace a bad one and was bad too."""
        return self.seen + self.skipped

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.seen + other.seen,
            self.skipped + other.skipped,
            self.damaged + other.damaged,
            self.retried + other.retried,
            self.read_bytes + other.read_bytes,
            self.by_shard_and_kind + other.by_shard_and_kind,
            self.incidents + other.incidents,
        )


class Ledger:
    """This rank's account of the samples, settled with the others' now and then.

    max_skip_rate: part of the samples tried that may be unusable, checked over the last BLOCK to 2 BLOCK samples;
    `amclip data check` counts the same part of the same samples before a run.
    images: what became of the shards' images before the first step.
    listed: incidents by shard and kind that incidents.jsonl has of this run's earlier attempts.
    gather: gives every rank the list of all ranks' values (alone: a list of one), so that all decide alike.
    """

    def __init__(
        self,
        max_skip_rate: float,
        gather: Gather = lambda value: [value],
        images: Account | None = None,
        listed: Counter[tuple[str, str]] | None = None,
    ) -> None:
        self._max_skip_rate, self._gather, self._images = max_skip_rate, gather, images
        self._local = Counts()
        self._before, self._recent, self.total = Counts(), Counts(), Counts(incidents=Counter(listed or ()))
        """of all ranks: the block before this one, this block, the whole run since its start"""

    def account(self, batch: Batch) -> list[dict[str, str]]:
        """Enters one batch of this rank. Returns its incidents that incidents.jsonl is to list: all of the first epoch,
        which comes by every sample once; of later ones, which come by the same again, LISTED of a shard and kind."""
        listed, new = [], Counter[tuple[str, str]]()
        for row in batch.incidents:
            place = row["shard"], row["kind"]
            new[place] += 1
            known = self.total.incidents[place] + self._local.incidents[place] + new[place]
            if batch.epoch == 0 or not row["shard"] or known <= LISTED:
                listed.append(row)
        skipped = [row for row in batch.incidents if row["action"] == SKIPPED]
        kinds = Counter(row["kind"] for row in batch.incidents)
        self._local += Counts(
            seen=len(batch.sample_ids),
            skipped=len(skipped),
            damaged=kinds["damaged"],
            retried=kinds["retried"],
            read_bytes=batch.read_bytes,
            by_shard_and_kind=Counter((row["shard"], row["kind"]) for row in skipped),
            incidents=new,
        )
        return listed

    def settle(self) -> Counts:
        """Adds up what all ranks entered since the last time. Raises RunStopped, on all of them, when too many samples
        were skipped. Collective: every rank must call."""
        interval = sum(self._gather(self._local), Counts())
        self._local = Counts()
        self.total += interval
        self._recent += interval
        window = self._before + self._recent
        if window.skipped > max(MIN_SKIPS_TO_STOP, self._max_skip_rate * window.tried):
            raise RunStopped(
                f"data.max_skip_rate: {window.skipped} of {window.tried} samples were unusable, above"
                f" {self._max_skip_rate:.1%}; worst: {worst_shards(window)}; `amclip data check` shows all"
            )
        if self._recent.seen >= BLOCK:
            self._before, self._recent = self._recent, Counts()
        return interval

    def summary(self) -> str:
        """The whole account in a line, as of the last settlement."""
        kinds: Counter[str] = Counter()
        for (_, kind), count in self.total.by_shard_and_kind.items():
            kinds[kind] += count
        causes = f" ({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())})" if kinds else ""
        total = self.total
        images = f"; {self._images}" if self._images else ""
        return (
            f"data: {total.seen} samples trained on, {total.skipped} skipped and replaced{causes},"
            f" {total.damaged} damaged but decoded, {total.retried} reads repeated,"
            f" {total.read_bytes / 1e9:.2f} GB read{images}"
        )


def listed_in(incidents: Path) -> Counter[tuple[str, str]]:
    """How many incidents of a shard and kind a run's incidents.jsonl lists; as far as it can be read."""
    found = Counter[tuple[str, str]]()
    with suppress(UserError):
        for row in each(incidents, {"shard": str, "kind": str}):
            found[row["shard"], row["kind"]] += 1
    return found


def worst_shards(counts: Counts) -> str:
    """The three shards that lost most, with how many and why."""
    by_shard: Counter[str] = Counter()
    for (shard, _), count in counts.by_shard_and_kind.items():
        by_shard[shard] += count
    reported = []
    for shard, count in by_shard.most_common(3):
        kinds = Counter({kind: n for (name, kind), n in counts.by_shard_and_kind.items() if name == shard})
        reported.append(f"{shard} {count} ({', '.join(kind for kind, _ in kinds.most_common(2))})")
    return ", ".join(reported)
