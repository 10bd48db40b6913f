"""Frequency: words that the training captions hold often go first (CLIPF, arXiv 2412.16148).

A table of counts is made by `amclip data stats SHARDS --words TABLE.json`. With f a word's share of all words that are
counted at least MIN_COUNT times, it is dropped with P = max(0, 1 - sqrt(threshold / f)); a word that the table does not
hold with P = 1. Of a caption over the budget, the words with the largest u - P stay, u a uniform draw for each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from amclip_ds.masks.text import Words

MIN_COUNT = 5
DIGITS = 6  # to which the published table rounds the root


@dataclass(frozen=True)
class Options:
    drop: Mapping[str, float]
    """word -> P; others are dropped first"""
    fills: bool
    """Whole words are added while they fit the budget; False, as the release: as many words as the budget has tokens,
    cut to as many tokens."""


def drop_probabilities(counts: Mapping[str, int], threshold: float) -> dict[str, float]:
    """P of each word that is counted at least MIN_COUNT times."""
    kept = {word: count for word, count in counts.items() if count >= MIN_COUNT}
    total = sum(kept.values())
    return {word: max(0.0, 1 - round(math.sqrt(threshold * total / count), DIGITS)) for word, count in kept.items()}


def draw(random: "np.random.Generator", n: int) -> "np.ndarray":
    """One number for each word; drawn for each of the n tokens, of which there are as many or more."""
    return random.random(n)


def apply(words: "Words", drawn: "np.ndarray", budget: int, options: Any) -> Sequence[int]:
    """The words that stay, in the text's order."""
    priority = [float(u) - options.drop.get(word, 1.0) for u, (word, _) in zip(drawn, words)]
    order = sorted(range(len(words)), key=lambda place: -priority[place])
    if not options.fills:
        most = min(budget, len(words))
        return list(_ids(words, order[:most]))[:most]
    chosen: list[int] = []
    left = budget
    for place in order:
        if len(words[place][1]) <= left:
            chosen.append(place)
            left -= len(words[place][1])
    return list(_ids(words, chosen or order[:1]))[:budget]


def _ids(words: "Words", places: Sequence[int]) -> Iterator[int]:
    for place in sorted(places):
        yield from words[place][1]
