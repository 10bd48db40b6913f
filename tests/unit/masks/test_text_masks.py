"""Text masks: the published code's rows from its own draws; what stays, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from amclip_ds import config
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.errors import UserError
from amclip_ds.masks.text import TEXT_MASKS, TextMaskConfig, masked

ORACLE = Path(os.environ.get("AMCLIP_ORACLE_DIR", Path(__file__).parents[4] / "shared" / "oracle")) / "methods"
SPECIAL = {13}  # special tokens in a caption: here they stay plain text


def words(text: str) -> list[tuple[str, list[int]]]:
    return build_tokenizer().words(text)


CAPTION = "a photo of the red car parked near the old stone bridge in the rain"


def test_the_words_are_the_encoder_s_own() -> None:
    for text in (CAPTION, "Don't mix ÄÖ with 日本語, ok? 123 ...", "<|endoftext|> stays text", ""):
        assert [one for _, ids in words(text) for one in ids] == build_tokenizer().encode(text)
    assert [word for word, _ in words("Two Dogs don't")] == ["two", "dogs", "don", "'t"]


@pytest.mark.parametrize("strategy", ["truncate", "random", "shuffle", "block"])
def test_a_caption_within_the_budget_stays_whole(strategy: str) -> None:
    ids = build_tokenizer().encode("a red car")
    assert masked(TextMaskConfig(strategy, tokens=5), words("a red car"), np.random.default_rng(0)) == ids
    assert len(masked(TextMaskConfig(strategy, tokens=4), words("a red car"), np.random.default_rng(0))) == 2


def test_what_stays_of_a_long_caption() -> None:
    ids = build_tokenizer().encode(CAPTION)
    place = {one: [n for n, other in enumerate(ids) if other == one] for one in ids}
    rows = {name: [masked(TextMaskConfig(name, tokens=8), words(CAPTION), np.random.default_rng(seed))
                   for seed in range(300)] for name in TEXT_MASKS}  # fmt: skip
    assert all(row == ids[:6] for row in rows["truncate"])
    assert {tuple(row) for row in rows["block"]} == {tuple(ids[n : n + 6]) for n in range(len(ids) - 5)}
    for row in rows["random"]:
        assert len(row) == 6 and is_in_order(row, ids)
    assert any(not is_in_order(row, ids) for row in rows["shuffle"])
    kept = np.zeros(len(ids))
    for row in rows["random"]:
        for one in row:
            kept[place[one]] += 1 / len(place[one])
    assert kept.min() > 300 * 6 / len(ids) * 0.7  # no place is favoured


def is_in_order(row: list[int], ids: list[int]) -> bool:
    rest = iter(ids)
    return all(one in rest for one in row)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_of_the_published_code(seed: int) -> None:
    file = ORACLE / f"text_seed{seed}.json"
    if not file.is_file():
        pytest.skip("seed 0 only" if seed else "no oracle; see CONTRIBUTING")
    facts, rows = json.loads(file.read_text()), load_file(file.with_suffix(".safetensors"))
    tokenizer = build_tokenizer()
    compared = 0
    for name, held in rows.items():
        strategy, _, context = name.partition(".c")
        if strategy not in ("truncate", "random", "shuffle", "block"):
            continue
        case = facts["cases"].get(name)
        draws = dict(zip(case["captions that are masked"], case["draws"])) if case else {}
        for number, text in enumerate(facts["captions"]):
            if number in SPECIAL:
                continue
            ids, budget = tokenizer.encode(text), int(context) - 2
            if number in draws or (case is None and len(ids) > budget):
                drawn = draws.get(number)
                if strategy == "block":
                    drawn = (drawn + 0.5) / (len(ids) - budget + 1)
                elif drawn is not None:
                    drawn = np.array(drawn)
                ids = list(TEXT_MASKS[strategy].apply(words(text), drawn, budget, None))
            row = [tokenizer.start, *ids, tokenizer.end]
            assert held[number].tolist() == row + [0] * (int(context) - len(row)), (name, number)
            compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    "given, said",
    [
        (["data.text_mask.tokens=3"], "data.text_mask.tokens: 3 is under 4"),
        (["data.text_mask.strategy=blok"], "data.text_mask.strategy: 'blok' is none of none, truncate"),
        (["data.text_mask.strategy=block", "data.text_mask.tokens=78"], "data.text_mask.tokens: 78 is above"),
        (["data.text_mask.budget=4"], "data.text_mask.budget: unknown key"),
        (["loss.text=both"], "loss.text: 'both' is neither masked nor plain"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(given: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("clip-tiny", given)
    assert said in str(error.value) and "\n" not in str(error.value)
