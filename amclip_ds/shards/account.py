"""What became of the images in the shards before the first step: images = samples + left out, each cause counted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from amclip_ds.errors import UserError
from amclip_ds.shards.grouping import ADVICE
from amclip_ds.shards.index import ShardEntry
from amclip_ds.shards.tar import printable

WITHOUT_PLACE = (
    "surplus image",
    "unread type",
    "too large",
    "sparse",
    "too far",
)  # images that no sample order can reach

MIN_SKIPS_TO_STOP = 16  # samples that cannot be used and stop no run, however few there are


@dataclass(frozen=True)
class Account:
    """What became of the shards' images before the first step: images = samples + left out."""

    samples: int
    left_out: dict[str, int]
    """cause -> images that are in the tars and in no sample"""
    scattered: int
    """samples without a caption whose caption is elsewhere in the tar"""
    first: dict[str, str]
    """cause -> the first one's name and shard"""

    @property
    def images(self) -> int:
        """In the tars."""
        return self.samples + sum(self.left_out.values())

    def check(self, max_skip_rate: float) -> None:
        """Raises UserError where packing has hidden more than this part of the images."""
        counts = Counter(self.left_out) + Counter({"not adjacent": self.scattered})  # those above 0
        if counts.total() > max(MIN_SKIPS_TO_STOP, max_skip_rate * self.images):
            [(kind, _)] = counts.most_common(1)
            listed = (
                " and ".join(f"{count} {kind}" for kind, count in counts.most_common()) if len(counts) > 1 else kind
            )
            advice = f"; {ADVICE[kind]}" if kind in ADVICE else ""
            raise UserError(
                f"data.train: {listed}: {counts.total()} of {self.images} images cannot be trained on, above"
                f" data.max_skip_rate={max_skip_rate:g}; the first is {self.first[kind]}{advice}"
            )

    def why_empty(self) -> str:
        """What indexing found instead of samples, with what to do; empty if it found nothing at all."""
        kinds = sorted(self.first, key=lambda kind: kind not in ADVICE)  # those first of which something can be said
        return "".join(
            f"; {kind}: {self.first[kind]}" + (f": {ADVICE[kind]}" if kind in ADVICE else "") for kind in kinds[:1]
        )

    def __str__(self) -> str:
        causes = "".join(f" + {count} {kind}" for kind, count in self.left_out.items())
        return f"{self.images} images in the shards = {self.samples} samples{causes}"


def account_of(shards: Iterable[ShardEntry]) -> Account:
    """The account of indexed shards."""
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    samples = scattered = 0
    for shard in shards:
        samples += shard.samples
        for problem in shard.problems:
            kind = problem["kind"]
            first.setdefault(kind, f"{printable(problem['key'])} in {printable(shard.path)}")
            if kind in WITHOUT_PLACE:
                left_out[kind] += problem["count"]
            elif kind == "not adjacent":
                scattered += problem["count"]
    return Account(samples, dict(left_out), scattered, first)
