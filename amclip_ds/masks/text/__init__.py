"""Which words of a caption stay. A text mask draws once for each sample and epoch, and picks tokens within a budget.

A text mask is one entry of TEXT_MASKS. It works on a caption's words with their token ids, without start and end token,
after the tokenizer's cache; captions within the budget stay whole. Nothing here loads torch.
Sources: CLIPA (arXiv 2305.07017), CLIPF (arXiv 2412.16148).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from amclip_ds.errors import LocalRunStopped, UserError, in_one_line, name_of
from amclip_ds.masks.text import frequency, syntax, tokens
from amclip_ds.masks.text import table as tables
from amclip_ds.masks.units import NONE

if TYPE_CHECKING:
    import numpy as np

LEAST_TOKENS = 4
Words = Sequence[tuple[str, Sequence[int]]]
"""a caption's words in order, cleaned and in lower case, each with its token ids"""


@dataclass(frozen=True)
class TextMask:
    """One way to shorten a caption."""

    draw: "Callable[[np.random.Generator, int], Any]"
    """(random, n) -> what is drawn for a caption of n tokens; the sample's own generator, after all its other draws"""
    apply: Callable[[Words, Any, int, Any], Sequence[int]]
    """(words, what was drawn, budget, options) -> at most `budget` of the ids, without start and end; asked only where
    there are more"""
    table: str = ""
    """what of data.text_mask.table it reads: counts or classes; empty: nothing"""


TEXT_MASKS: dict[str, TextMask] = {
    "truncate": TextMask(tokens.draw_nothing, tokens.truncate),
    "random": TextMask(tokens.draw_order, tokens.random),
    "shuffle": TextMask(tokens.draw_order, tokens.shuffle),
    "block": TextMask(tokens.draw_place, tokens.block),
    "frequency": TextMask(frequency.draw, frequency.apply, table="counts"),
    "syntax": TextMask(tokens.draw_nothing, syntax.apply, table="classes"),
}


@dataclass
class TextMaskConfig:
    """How captions are shortened before the text tower reads them."""

    strategy: str = NONE
    """none | truncate (the first tokens stay) | random | shuffle (random, in a random order) | block (neighbours) |
    frequency (rare words stay) | syntax (nouns first, then adjectives, then verbs)."""
    tokens: int = 8
    """Most tokens of a text, start and end token among them."""
    table: str | None = None
    """A json of words: frequency reads their counts (`amclip data stats SHARDS --words FILE`), syntax their classes."""
    threshold: float = 1e-6
    """frequency: words of a larger share of all words are dropped the more, the more frequent they are."""

    def __post_init__(self) -> None:
        if self.strategy not in (NONE, *TEXT_MASKS):
            known = ", ".join((NONE, *TEXT_MASKS))
            raise ValueError(f"data.text_mask.strategy: {self.strategy!r} is none of {known}")
        if self.read_of_table and not self.table:
            how = tables.HOW[self.read_of_table]
            raise ValueError(f"data.text_mask.table: data.text_mask.strategy={self.strategy} needs it; {how}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"data.text_mask.threshold: {self.threshold} is outside (0, 1)")
        if self.tokens < LEAST_TOKENS:
            raise ValueError(
                f"data.text_mask.tokens: {self.tokens} is under {LEAST_TOKENS}; start and end token are among them"
            )

    @property
    def read_of_table(self) -> str:
        """What of the table the strategy reads: counts or classes; empty: nothing."""
        return TEXT_MASKS[self.strategy].table if self.strategy != NONE else ""

    def read_table(self) -> tables.Table | None:
        """The table, where the strategy reads one. Raises UserError."""
        return tables.read(self.table, self.read_of_table) if self.table and self.read_of_table else None


def prepare(config: TextMaskConfig, fills: bool, table_hash: str) -> Any:
    """A strategy's options, made once in each process that masks texts. fills: frequency.Options.

    table_hash: of the table as the run began with it. Raises LocalRunStopped where the file is another by now.
    """
    held = config.read_table()
    if held is None:
        return config
    if held.hash != table_hash:
        raise LocalRunStopped(f"data.text_mask.table: {config.table} was changed while the run was under way")
    if config.read_of_table == "classes":
        return held.words
    return frequency.Options(frequency.drop_probabilities(held.words, config.threshold), fills)


def masked(config: TextMaskConfig, options: Any, words: Words, random: "np.random.Generator") -> list[int]:
    """The ids that stay, without start and end. Draws as often whether the caption is short or long.

    Raises UserError where a mask that is not ours raises, or gives something else than ids.
    """
    mask, ids = TEXT_MASKS[config.strategy], tokens.ids_of(words)
    name, budget = name_of(mask.apply), config.tokens - 2
    try:
        drawn = mask.draw(random, len(ids))
        if len(ids) <= budget:
            return ids
        chosen = list(mask.apply(words, drawn, budget, options))[:budget]
        are_ids = all(isinstance(one, Integral) for one in chosen) and set(chosen) <= set(ids)
    except Exception as error:
        if name.startswith("amclip_ds."):
            raise
        raise UserError(f"text mask {name} raised {type(error).__name__}: {in_one_line(error, 300)}") from error
    if not are_ids:
        raise UserError(f"text mask {name} gave {str(chosen)[:100]}; it picks of the caption's own ids")
    return chosen
