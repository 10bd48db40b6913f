"""Text masks: what stays, and what is refused; tests/parity holds them against the published code's rows."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from amclip_ds import cli, config, preconditions
from amclip_ds.data.captions import build_tokenizer, tokenizer_hash
from amclip_ds.data.loader import TrainingData
from amclip_ds.errors import RunStopped, UserError
from amclip_ds.masks.text import TextMaskConfig, frequency, syntax, table
from amclip_ds.masks.text import masked as mask_text
from amclip_ds.masks.text.frequency import Options, drop_probabilities
from tests.unit.data.shards import open_data, write_shards

BY_TOKENS = ("truncate", "random", "shuffle", "block")


def masked(config: TextMaskConfig, given: list[tuple[str, list[int]]], random: np.random.Generator) -> list[int]:
    return mask_text(config, None, given, random)


def words(text: str) -> list[tuple[str, list[int]]]:
    return build_tokenizer().words(text)


CAPTION = "a photo of the red car parked near the old stone bridge in the rain"


def test_the_words_are_the_encoder_s_own() -> None:
    for text in (CAPTION, "Don't mix ÄÖ with 日本語, ok? 123 ...", "<|endoftext|> stays text", ""):
        assert [one for _, ids in words(text) for one in ids] == build_tokenizer().encode(text)
    assert [word for word, _ in words("Two Dogs don't")] == ["two", "dogs", "don", "'t"]


@pytest.mark.parametrize("strategy", BY_TOKENS)
def test_a_caption_within_the_budget_stays_whole(strategy: str) -> None:
    ids = build_tokenizer().encode("a red car")
    assert masked(TextMaskConfig(strategy, tokens=5), words("a red car"), np.random.default_rng(0)) == ids
    assert len(masked(TextMaskConfig(strategy, tokens=4), words("a red car"), np.random.default_rng(0))) == 2


def test_what_stays_of_a_long_caption() -> None:
    ids = build_tokenizer().encode(CAPTION)
    place = {one: [n for n, other in enumerate(ids) if other == one] for one in ids}
    rows = {
        name: [
            masked(TextMaskConfig(name, tokens=8), words(CAPTION), np.random.default_rng(seed)) for seed in range(300)
        ]
        for name in BY_TOKENS
    }
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


def table_of(folder: Path, counts: dict[str, int], **changes: object) -> Path:
    file = folder / "words.json"
    made = {"format": 1, "tokenizer": tokenizer_hash(), "samples": 9, "counts": counts}
    file.write_text(json.dumps(made | changes))
    return file


def test_frequent_words_go_first_and_whole_words_fill_the_budget() -> None:
    """A word that is not in the table goes before all others, and one that does not fit leaves room for a shorter."""
    given = [("the", [1]), ("otorhinolaryngologist", [2, 3, 4, 5]), ("zebra", [6]), ("the", [1]), ("a", [7])]
    options = Options(drop_probabilities({"the": 5000, "a": 4000, "zebra": 9, "once": 1}, 1e-3), fills=True)
    assert options.drop["zebra"] == 0.0 < options.drop["a"] < options.drop["the"] and "once" not in options.drop
    u = np.full(9, 0.5)
    assert frequency.apply(given, u, 3, options) == [1, 6, 7]
    assert frequency.apply(given, np.array([0, 0.99, 0, 0, 0]), 5, options) == [2, 3, 4, 5, 6]
    as_released = dataclasses.replace(options, fills=False)  # as many words as the budget has tokens, then cut
    assert frequency.apply(given, np.array([0, 0.99, 0, 0, 0]), 2, as_released) == [2, 3]
    assert frequency.apply([("otorhinolaryngologist", [2, 3, 4, 5])], u, 2, options) == [2, 3]


def test_nouns_stay_first_and_what_is_unknown_goes_first(tmp_path: Path) -> None:
    given = [("a", [1]), ("red", [2]), ("car", [3]), ("parked", [4]), ("by", [5]), ("bridges", [6, 7])]
    classes = {"car": "noun", "bridges": "noun", "red": "adjective", "parked": "verb"}
    assert [syntax.apply(given, None, budget, classes) for budget in (2, 3, 4)] == [[3, 6], [2, 3, 6], [2, 3, 4, 6]]
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"format": 1, "classes": classes | {"odd": "pronoun"}}))
    with pytest.raises(UserError, match="the class of 'odd' is none of noun, adjective, verb, other"):
        table.read(str(file), "classes")


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "missing"),
        ("{", "not a json file"),
        ("[1]", "no table of words with their counts; `amclip data stats"),
        ('{"format": 2, "tokenizer": "x", "counts": {}}', "no table of words"),
        ('{"format": 1, "tokenizer": "x", "counts": {"a": -1}}', "the count of 'a' is no whole number above 0"),
        ('{"format": 1, "classes": {"a": "noun"}}', "no table of words with their counts"),
        ('{"format": 1, "counts": {"a": true}}', "is no whole number"),
        (
            '{"format": 1, "tokenizer": "x", "counts": {"a": "__import__(0)"}}',
            "the count of 'a' is no whole number above 0",
        ),
    ],
)
def test_a_file_that_is_no_table(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "words.json").write_text(content)
    with pytest.raises(UserError, match="data.text_mask.table: ") as error:
        table.read(str(tmp_path / "words.json"), "counts")
    assert said.lower() in str(error.value).lower() and "\n" not in str(error.value)


def test_the_stream_reads_the_table_once_and_refuses_another(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", (12,))
    file = table_of(tmp_path, {"picture": 50, "of": 40, "shard": 30})

    def opened(**changes: object) -> TrainingData:
        text_mask = TextMaskConfig("frequency", tokens=4, table=str(file), threshold=1e-2)
        return open_data(tmp_path / "shards", global_batch=12, text_mask=text_mask, **changes)

    data = opened()
    batch, plain = next(data.batches(None)), next(open_data(tmp_path / "shards", global_batch=12).batches(None))
    tokenizer = build_tokenizer()
    assert batch.masked_ids is not None and batch.masked_ids.shape == (12, 4) and len(data.words_hash) == 64
    assert (batch.masked_ids[:, 0] == tokenizer.start).all() and (batch.masked_ids[:, -1] == tokenizer.end).all()
    assert torch.equal(batch.token_ids, plain.token_ids) and torch.equal(batch.views_uint8, plain.views_uint8)
    assert torch.equal(batch.mask_noise, plain.mask_noise)
    changed = opened()
    table_of(tmp_path, {"picture": 51, "of": 40, "shard": 30})
    assert opened().words_hash != data.words_hash
    with pytest.raises(RunStopped, match="data.text_mask.table: .* was changed while the run was under way"):
        next(changed.batches(None))
    table_of(tmp_path, {"picture": 51}, tokenizer="another")
    with pytest.raises(UserError, match="is of the words of another tokenizer; make it again"):
        opened()
    with pytest.raises(UserError, match="is of the words of another tokenizer; make it again"):  # before any rank
        preconditions.check_words(config.load("frequency-tiny", [f"data.text_mask.table={file}"]))


def test_the_command_counts_the_words_of_all_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "shards", (7, 3))
    out = tmp_path / "words.json"
    assert cli.main(["data", "stats", str(tmp_path / "shards"), "--words", str(out), "--workers", "1"]) == 0
    made = table.read(str(out), "counts")
    assert made.words["picture"] == made.words["shard"] == 10 and made.words["3"] == 1
    assert made.tokenizer == tokenizer_hash() and "words ->" in capsys.readouterr().out
    assert cli.main(["data", "stats", str(tmp_path / "shards"), "--words", str(tmp_path / "no" / "words.json")]) == 2


@pytest.mark.parametrize(
    "given, said",
    [
        (["data.text_mask.tokens=3"], "data.text_mask.tokens: 3 is under 4"),
        (["data.text_mask.strategy=blok"], "data.text_mask.strategy: 'blok' is none of none, truncate"),
        (["data.text_mask.strategy=frequency"], "data.text_mask.table: data.text_mask.strategy=frequency needs it"),
        (["data.text_mask.threshold=0"], "data.text_mask.threshold: 0.0 is outside (0, 1)"),
        (["data.text_mask.strategy=block", "data.text_mask.tokens=78"], "data.text_mask.tokens: 78 is above"),
        (["data.text_mask.budget=4"], "data.text_mask.budget: unknown key"),
        (["loss.text=both"], "loss.text: 'both' is neither masked nor plain"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(given: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("clip-tiny", given)
    assert said in str(error.value) and "\n" not in str(error.value)
