"""Text masks that read tokens alone: truncate, random, shuffle, block."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from amclip_ds.masks.text import Words


def draw_nothing(random: "np.random.Generator", n: int) -> None:
    """Nothing is by chance."""


def draw_order(random: "np.random.Generator", n: int) -> "np.ndarray":
    """A permutation of the n tokens."""
    return random.permutation(n)


def draw_place(random: "np.random.Generator", n: int) -> float:
    """Where in the caption, 0 to 1."""
    return float(random.random())


def truncate(words: "Words", drawn: None, budget: int, options: Any) -> Sequence[int]:
    """The first tokens."""
    return ids_of(words)[:budget]


def random(words: "Words", drawn: "np.ndarray", budget: int, options: Any) -> Sequence[int]:
    """The first places of the permutation, in the text's order."""
    ids = ids_of(words)
    return [ids[place] for place in sorted(drawn[:budget])]


def shuffle(words: "Words", drawn: "np.ndarray", budget: int, options: Any) -> Sequence[int]:
    """The first places of the permutation, in its order."""
    ids = ids_of(words)
    return [ids[place] for place in drawn[:budget]]


def block(words: "Words", drawn: float, budget: int, options: Any) -> Sequence[int]:
    """Neighbours: every start at which a whole block fits is as likely."""
    ids = ids_of(words)
    start = int(drawn * (len(ids) - budget + 1))
    return ids[start : start + budget]


def ids_of(words: "Words") -> list[int]:
    """All token ids, in order."""
    return [one for _, held in words for one in held]
