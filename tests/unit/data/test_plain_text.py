"""Texts as their reader sees them: encodings, lines, blanks; in check, training and evaluation alike."""

import codecs
import contextlib
import json
from pathlib import Path

import pytest

from amclip_ds.data.captions import build_tokenizer, candidates
from amclip_ds.data.check import CheckConfig, check
from amclip_ds.data.plain_text import BadText, decode, is_blank, lines, parse_object, visible
from amclip_ds.evaluate.datasets import open_set
from tests.unit.data.damaged import sample, samples, tar_of
from tests.unit.data.shards import open_data

WORDS = "ein Fuß, 犬, \U0001f642"


ENCODINGS = [
    (b"", "utf-8"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
]


@pytest.mark.parametrize("mark, encoding", ENCODINGS)
def test_encodings_that_a_mark_names(mark: bytes, encoding: str) -> None:
    assert decode(mark + WORDS.encode(encoding)) == WORDS
    fields = json.dumps({"caption": WORDS}, ensure_ascii=False)
    assert parse_object(mark + fields.encode(encoding)) == {"caption": WORDS}


@pytest.mark.parametrize("content", [b"caf\xe9", codecs.BOM_UTF16_LE + b"a", codecs.BOM_UTF8 + b"\xff"])
def test_no_encoding_is_guessed(content: bytes) -> None:
    with pytest.raises(BadText, match=r"^a text that is not UTF-(8|16)$") as caught:
        decode(content)
    assert caught.value.kind == "not utf-8"


@pytest.mark.parametrize(
    "fields, cause",
    [
        (b'{"a": ', "json that cannot be read: Expecting value"),
        (b"[" * 200_000, "json that is nested too deeply"),
        (b"[1]", "json that is no object"),
        (b'{"a": ' + b"1" * 5000 + b"}", "json with a number of thousands of digits"),
    ],
)
def test_causes_of_bad_json_can_be_counted(fields: bytes, cause: str) -> None:
    with pytest.raises(BadText) as caught:
        parse_object(fields)
    assert (caught.value.kind, str(caught.value)) == ("bad json", cause)


@pytest.mark.parametrize(
    "text, captions",
    [
        ("a red\u2028boat", ["a red boat"]),
        ("a red\u2029boat", ["a red boat"]),
        ("a red\x0bboat\x0c", ["a red boat"]),
        ("a red\x85boat", ["a red boat"]),
        ("a red\x1cboat", ["a red boat"]),
        ("one\r\ntwo\rthree\n\nfour", ["one", "two", "three", "four"]),
        ("one\r", ["one"]),
        ("\u200b\none\n\0\0", ["one"]),
        ("a\0b", ["a\0b"]),
    ],
)
def test_lines_are_those_that_an_editor_shows(text: str, captions: list[str]) -> None:
    assert visible(lines(text)) == captions
    assert candidates(text.encode(), None, ["txt"], True) == captions


def test_a_break_within_a_caption_parts_its_words() -> None:
    tokenizer = build_tokenizer()
    [caption] = candidates(b"a red\x0bboat", None, ["txt"], True)
    assert tokenizer.encode(caption) == tokenizer.encode("a red boat")


BLANK = [
    "",
    " \n\t",
    "\0",
    "\u200b",
    "\ufeff",
    "\u2060 \u200d",
    "\u00ad",
    "\u3164",
    "\u2800",
    "\u00a0\u3000",
    "&nbsp;",
    "&amp;nbsp;",
    "&#8203;",
    "\ufe0f",
    "\U000e0020",
    "\x7f",
    "\u202e",
]


@pytest.mark.parametrize("text", BLANK)
def test_what_nobody_sees_is_blank(text: str) -> None:
    assert is_blank(text) and not visible([text])
    for content, fields in ((text.encode(), None), (None, json.dumps({"caption": text}).encode())):
        with pytest.raises(BadText) as caught:
            candidates(content, fields, ["txt|json:caption"], True)
        assert caught.value.kind == "empty caption"


@pytest.mark.parametrize(
    "text", ["!", "é", "犬", "\U0001f642", "👨\u200d👩", "&", "&lt;", "0", "-", "\ue000", "a\u200b"]
)
def test_what_somebody_sees_is_not(text: str) -> None:
    assert not is_blank(text) and visible([text]) == [text]
    assert build_tokenizer().encode(text)


def test_the_next_source_replaces_a_blank_one() -> None:
    assert candidates("\u200b".encode(), b'{"caption": "a boat"}', ["txt|json:caption"], True) == ["a boat"]
    with pytest.raises(BadText, match="no text in txt") as caught:
        candidates(None, b'{"caption": "a boat"}', ["txt"], True)
    assert caught.value.kind == "no caption"
    with pytest.raises(BadText):
        candidates(None, b'{"title": ""}', ["{title}"], True)


def test_check_training_and_evaluation_see_the_same_captions(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    marked = sample(4, txt=None, json=b"\xef\xbb\xbf" + json.dumps({"caption": "picture number 4"}).encode())
    odd = [*sample(2, txt="picture number 2".encode("utf-16")), *sample(3, txt="\ufeffpicture\u2028number 3".encode())]
    shard.write_bytes(tar_of([*samples(range(2)), *odd, *marked]))
    report = check([str(shard)], CheckConfig(), 1)
    assert report.total("read") == 5 and not report.problems()
    wanted = [f"picture number {number}" for number in range(5)]
    assert sorted(report.shards[0].texts) == wanted
    assert [one.captions for one in open_set(str(shard), task="retrieval").samples] == [(text,) for text in wanted]
    data = open_data(shard, global_batch=5, teacher_size=None, num_units=0, context_length=77, text_bucket=0)
    with contextlib.closing(data):
        batch = next(data.batches())
    expected = build_tokenizer()([wanted[number] for number in batch.sample_ids.tolist()])
    assert not batch.incidents and batch.token_ids.equal(expected)
