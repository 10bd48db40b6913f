"""Cloze: a share of a text's word tokens is hidden, to be predicted from the others (objectives/mlm.py).

A hidden token holds ~id, which is negative: one row says where words are hidden and which they were. Start, end and
what fills a row up are never hidden. Nothing here loads torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def num_hidden(words: int, share: float) -> int:
    """How many of so many word tokens are hidden: the share, rounded, and at least one of any."""
    return max(1, round(words * share)) if words > 0 else 0


def hide(row: "np.ndarray", length: int, drawn: "np.ndarray", share: float) -> "np.ndarray":
    """A text's ids [T] with some hidden. length: its tokens, with start and end; drawn: a number for each place."""
    words, found = length - 2, row.copy()
    places = 1 + drawn[: max(words, 0)].argsort(kind="stable")[: num_hidden(words, share)]
    found[places] = ~found[places]
    return found
