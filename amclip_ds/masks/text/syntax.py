"""Syntax: nouns stay before adjectives, those before verbs, those before all else (CLIPA, arXiv 2305.07017).

The classes come from a table of the user's, word by word: no tagger reads the sentence.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from amclip_ds.masks.text.table import CLASSES

if TYPE_CHECKING:
    from amclip_ds.masks.text import Words


def apply(words: "Words", drawn: None, budget: int, options: Any) -> Sequence[int]:
    """The first `budget` words by class, of a class in the text's order; then the text's order, cut to the budget.

    options: word -> class; a word that is not in it is `other`.
    """
    classes: Mapping[str, str] = options
    order = sorted(range(len(words)), key=lambda place: CLASSES.index(classes.get(words[place][0], "other")))
    return [one for place in sorted(order[:budget]) for one in words[place][1]][:budget]
