"""Text masks against the published code's rows, from its own draws (oracle/methods/text)."""

import numpy as np
import pytest
from torch import Tensor

from amclip_ds.data.captions import build_tokenizer
from amclip_ds.masks.text import TEXT_MASKS
from amclip_ds.masks.text.frequency import Options, drop_probabilities
from amclip_ds.masks.text.table import CLASSES
from tests.parity.numbers import Numbers

SPECIAL = {13}  # special tokens in a caption: here they stay plain text
ENCODED_TWICE = {6, 7, 15}  # captions that are not ASCII, whose words the release encodes a second time


def check_tokens(numbers: Numbers) -> None:
    """truncate, random, shuffle, block."""
    for name in numbers.names():
        strategy, _, context = name.partition(".c")
        if strategy in ("truncate", "random", "shuffle", "block"):
            check_rows(numbers, name, strategy, int(context), SPECIAL)


def check_frequency(numbers: Numbers) -> None:
    """As the release: so many words as the budget has tokens, cut to as many; and the words' probabilities."""
    options = Options(drop_probabilities(numbers.meta["counts"], 1e-2), fills=False)
    for name, expected in numbers.meta["drop_probability"].items():
        found = drop_probabilities(numbers.meta["counts"], float(name.removeprefix("t")))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for name in numbers.names("frequency."):
        check_rows(numbers, name, "frequency", int(name.partition(".c")[2]), SPECIAL | ENCODED_TWICE, options)


def check_syntax(numbers: Numbers) -> None:
    """From the words and classes that its tagger gave, where its sort left equal classes in their order."""
    tokenizer = build_tokenizer()
    for name in numbers.names("syntax."):
        case, context, rows = numbers.cases[name], int(name.partition(".c")[2]), numbers[name]
        classes_of = next(held for key, held in case.items() if key.startswith("classes"))
        for number, (spoken, classes) in enumerate(zip(case["words"], classes_of)):
            if number in SPECIAL or number in case.get("differs from a stable sort", ()):
                continue
            words = [(f"{place}", tokenizer.encode(word)) for place, word in enumerate(spoken)]
            named = {f"{place}": CLASSES[kind - 1] for place, kind in enumerate(classes)}
            ids = list(TEXT_MASKS["syntax"].apply(words, None, context - 2, named))
            row = [tokenizer.start, *ids, tokenizer.end]
            assert rows[number].tolist() == row + [0] * (context - len(row)), (name, number)


def check_rows(
    numbers: Numbers, name: str, strategy: str, context: int, left_out: set[int], options: Options | None = None
) -> None:
    case = numbers.cases.get(name)
    draws = dict(zip(case["captions that are masked"], case["draws"])) if case else {}
    rows: Tensor = numbers[name]
    tokenizer, budget = build_tokenizer(), context - 2
    for number, text in enumerate(numbers.meta["captions"]):
        if number in left_out:
            continue
        words = tokenizer.words(text)
        ids = [one for _, held in words for one in held]
        if len(ids) > budget:
            drawn = draws.get(number)
            if strategy == "block":
                drawn = (drawn + 0.5) / (len(ids) - budget + 1)  # the start itself, as a place from 0 to 1
            elif drawn is not None:
                drawn = np.array(drawn)
            ids = list(TEXT_MASKS[strategy].apply(words, drawn, budget, options))
        row = [tokenizer.start, *ids, tokenizer.end]
        assert rows[number].tolist() == row + [0] * (context - len(row)), (name, number)
