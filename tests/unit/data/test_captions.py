"""Captions: the tokens of CLIP's own encoder, no injected special tokens, several sources, trimming."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amclip_ds.data import captions
from amclip_ds.data.captions import build_tokenizer, candidates, choose, trim
from amclip_ds.data.config import check_sources

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
START, END = 49406, 49407


def test_golden_tokens(shared_dir: Path) -> None:
    """Every row of OpenAI's tokenizer's answers, but that with literal special tokens, which stay plain text here."""
    rows = [json.loads(line) for line in (shared_dir / "data" / "golden_tokens.jsonl").read_text().splitlines()]
    plain = [row for row in rows if not any(token in row["text"] for token in SPECIAL)]
    assert len(plain) == len(rows) - 1 > 5
    tokens = build_tokenizer()([row["text"] for row in plain], 77)
    for row, ids in zip(plain, tokens.tolist()):
        assert ids == row["ctx77"], row["text"]


def test_a_caption_cannot_inject_special_tokens() -> None:
    [ids] = build_tokenizer()(["a dog <|endoftext|> and <|startoftext|> a cat"], 77).tolist()
    assert ids.count(END) == 1 and ids.count(START) == 1
    assert ids.index(END) == max(place for place, token in enumerate(ids) if token), "the end is the last token"


@pytest.mark.parametrize("words", [74, 75, 76, 77, 200])
def test_a_long_text_keeps_its_end_in_the_last_place(words: int) -> None:
    [ids] = build_tokenizer()(["dog " * words], 77).tolist()
    assert ids[0] == START and ids.index(END) == min(words + 1, 76)
    assert ids[min(words + 2, 77) :] == [0] * (77 - min(words + 2, 77))


def split_by_open_clip(text: str) -> list[str]:
    return captions.SPLIT.findall(build_tokenizer()._tokenizer.clean_fn(text))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
@settings(max_examples=300, deadline=None)
def test_plain_text_is_split_as_open_clip_does(text: str) -> None:
    """Visible ASCII without an ampersand is not passed through what fixes encodings and unescapes HTML."""
    assert build_tokenizer().split(text) == split_by_open_clip(text)
    assert bool(captions.PLAIN.fullmatch(text)) == ("&" not in text)


@pytest.mark.parametrize("text", ["R&amp;B", "\u201ccurly\u201d", "caf\u00c3\u00a9", "\ufb01sh", "\u001b[36;44mfish"])
def test_what_is_not_plain_is_fixed(text: str) -> None:
    assert captions.PLAIN.fullmatch(text) is None
    assert build_tokenizer().split(text) == split_by_open_clip(text)
    assert split_by_open_clip(text) != captions.SPLIT.findall(text.lower()), "nothing was to be fixed"


TEXT, FIELDS = (
    b"one\n two \n\n",
    json.dumps({"title": "T", "text": "x", "n": 3, "captions": ["c", " ", "d"], "e": ""}).encode(),
)


@pytest.mark.parametrize(
    "sources, per_line, expected",
    [
        (["txt"], True, ["one", "two"]),
        (["txt"], False, ["one\n two"]),
        (["json:captions"], True, ["c", "d"]),
        (["json:title"], True, ["T"]),
        (["{title}. {text} {n}"], True, ["T. x 3"]),
        (["json:absent|json:e|txt"], False, ["one\n two"]),
        (["txt|json:title"], False, ["one\n two"]),
        (["txt", "json:title"], True, ["one", "two", "T"]),
    ],
)
def test_sources(sources: list[str], per_line: bool, expected: list[str]) -> None:
    assert candidates(TEXT, FIELDS, sources, per_line) == expected


@pytest.mark.parametrize("text, fields", [(b"\xff", None), (None, b"{"), (None, b"[1]"), (None, b"\xff{}")])
def test_what_cannot_be_read_is_an_error(text: bytes | None, fields: bytes | None) -> None:
    with pytest.raises(ValueError):
        candidates(text, fields, ["txt|json:title"], True)


def test_a_source_that_can_never_yield_is_refused() -> None:
    check_sources(["txt|json:a", "{a} {b}"])
    for source in ("text", "json:", "txt|", "no field"):
        with pytest.raises(ValueError, match=r"data\.captions"):
            check_sources([source])


def test_captions_are_drawn_uniformly() -> None:
    random = np.random.default_rng(0)
    drawn = [choose(["a", "b", "c"], random) for _ in range(3000)]
    assert all(900 < drawn.count(caption) < 1100 for caption in "abc")


def test_trim_cuts_padding_alone_in_buckets() -> None:
    tokens = build_tokenizer()(["a dog", ""], 77)
    tokens[1, :6] = torch.tensor([START, 5, 0, 0, 0, END])  # token 0 is also a word (part): only behind the end it pads
    for bucket, width in ((1, 6), (4, 8), (8, 8), (100, 77), (0, 77)):
        cut = trim(tokens, bucket)
        assert cut.shape == (2, width)
        assert torch.equal(cut, tokens[:, :width]) and not tokens[:, width:].any()


def test_trimmed_texts_have_the_features_of_the_full_context() -> None:
    """Causal attention: what is behind the end cannot reach it. The twin: cutting the end off changes them."""
    from amclip_ds.model.text import TextConfig, TextTower

    torch.manual_seed(0)
    tower = TextTower(TextConfig(width=32, depth=2, heads=2)).eval()
    tokens = build_tokenizer()(["a dog on a bed", "a cat"], 77)
    with torch.no_grad():
        full, short = tower(tokens), tower(trim(tokens, 4))
        cut = tower(tokens[:, :5])
    assert torch.allclose(full, short, atol=1e-6)
    assert not torch.allclose(full[0], cut[0], atol=1e-3)


def test_the_tokenizer_is_one_a_process() -> None:
    assert build_tokenizer() is build_tokenizer()
    assert captions.build_tokenizer().end == END
