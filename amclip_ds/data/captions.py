"""From a sample's text and json members to token ids: which caption, what its text is, how it is encoded."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

from amclip_ds.data.plain_text import BadText, decode, lines, parse_object, visible
from amclip_ds.errors import UserError
from amclip_ds.masks.text.table import Table
from amclip_ds.module_alone import import_alone

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # the encoder's pattern without special tokens
SPLIT = regex.compile(WORDS, regex.IGNORECASE)
PROBE = "A photo of 2 zebras, crossing the Straße (50 %) at naïve speed; 東京 isn't far."
PLAIN = re.compile(r"[ -%'-~]*")  # visible ASCII without "&", in which nothing is to be fixed or unescaped
LONGEST_TEXT, LONGEST_WORD = 1 << 16, 1000  # characters
WORDS_REMEMBERED = 1 << 17
Tokenizer = Callable[[Sequence[str], int], Tensor]


class ClipTokenizer:
    """CLIP's byte-pair encoding (open_clip's vocabulary), lower-cased; a caption cannot inject special tokens.

    open_clip encodes a literal `<|endoftext|>` in a caption as the end token; here it stays plain text.
    """

    def __init__(self) -> None:
        self._tokenizer = import_alone("open_clip", "tokenizer").SimpleTokenizer()
        self._tokenizer.cache.clear()  # holds the special tokens as words of their own
        self._ids: dict[str, list[int]] = {}
        """of words that were seen lately"""
        self.start, self.end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids without start and end; at least the first `limit` of them, if so many are there.

        A word of a thousand characters already fills any context, and pairing bytes takes time with the square of a
        word's length: a megabyte without a space (a blob in a caption) would take hours. Longer ones are cut.
        """
        ids: list[int] = []
        for word in self.split(text):
            ids += self._word(word)
            if limit is not None and len(ids) >= limit:
                break
        return ids

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, cleaned and in lower case, each with its token ids; together they are `encode`'s."""
        return [(word, self._word(word)) for word in self.split(text)]

    def split(self, text: str) -> list[str]:
        """The words of a text, cleaned and in lower case."""
        text = text[:LONGEST_TEXT]
        clean = " ".join(text.lower().split()) if PLAIN.fullmatch(text) else self._tokenizer.clean_fn(text)
        return SPLIT.findall(clean)

    def _word(self, word: str) -> list[int]:
        """A word's ids; not to be changed."""
        word = word[:LONGEST_WORD]
        if (known := self._ids.get(word)) is not None:
            return known
        if len(self._ids) > WORDS_REMEMBERED:
            self._ids.clear()
        symbols = "".join(self._tokenizer.byte_encoder[byte] for byte in word.encode("utf-8"))
        self._ids[word] = ids = [self._tokenizer.encoder[piece] for piece in self._tokenizer.bpe(symbols).split(" ")]
        self._tokenizer.cache.clear()
        return ids

    def row(self, text: str, context_length: int) -> np.ndarray:
        """[context_length] int64: start, words, end, then zeros; a longer text keeps the end in its last place."""
        ids = [self.start, *self.encode(text, context_length)[: context_length - 2], self.end]
        row = np.zeros(context_length, np.int64)
        row[: len(ids)] = ids
        return row

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> Tensor:
        """[B, context_length] int64: a row each."""
        rows = [self.row(text, context_length) for text in texts]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, context_length), np.int64))

    def text_of(self, ids: Sequence[int]) -> str:
        """A row of ids as text again, lower-cased as it was encoded, without start, end and what fills it up."""
        text = self._tokenizer.decode([number for number in ids if number not in (0, self.start, self.end)])
        return text.strip()


def tokenizer_hash() -> str:
    """A tokenizer is known by what it makes of PROBE."""
    ids = build_tokenizer()([PROBE], 77)
    return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()


def check_table(table: Table, path: str | None) -> None:
    """Raises UserError for a table of the words of another tokenizer."""
    if table.tokenizer and table.tokenizer != tokenizer_hash():
        raise UserError(
            f"data.text_mask.table: {path} is of the words of another tokenizer; make it again: amclip data stats"
            f" SHARDS --words {path}"
        )


@functools.cache
def build_tokenizer() -> ClipTokenizer:
    """The tokenizer of every text tower here, one a process."""
    return ClipTokenizer()


def trim(token_ids: Tensor, bucket: int) -> Tensor:
    """[B, T] without the zeros after the longest text, in steps of `bucket` tokens (0: as it is); features stay
    equal."""
    if bucket == 0:
        return token_ids
    longest = max(lengths(token_ids))
    return token_ids[:, : min(token_ids.shape[1], -(-longest // bucket) * bucket)].contiguous()


def lengths(token_ids: Tensor) -> tuple[int, ...]:
    """Tokens of each text [B, T], from start to end token: the end token is not 0, though a word ("!") is."""
    columns = torch.arange(1, token_ids.shape[1] + 1)
    return tuple(((token_ids != 0) * columns).amax(dim=1).tolist())


def members_read(sources: Sequence[str]) -> tuple[bool, bool]:
    """Whether these sources read a sample's text member, and its json member."""
    alternatives = [part for source in sources for part in source.split("|")]
    return "txt" in alternatives, any(part != "txt" for part in alternatives)


def candidates(text: bytes | None, fields: bytes | None, sources: Sequence[str], per_line: bool) -> list[str]:
    """Every caption a sample offers, in the order of `sources`.

    A source is `txt`, `json:FIELD` (a text or a list of texts), a template of json fields such as
    `{title}. {description}`, or alternatives joined by `|`, of which the first that yields something counts.
    Raises BadText if there is none, for text that is not UTF-8 and for json that cannot be read.
    """
    parsed: dict[str, Any] | None = None
    found: list[str] = []
    are_blank = False
    for source in sources:
        for alternative in source.split("|"):
            if alternative == "txt":
                written = _from_text(text, per_line)
            else:
                parsed = (parse_object(fields) if fields else {}) if parsed is None else parsed
                written = _from_json(parsed, alternative)
            options = visible(written)
            if options:
                found += options
                break
            are_blank = are_blank or bool(written)
    if not found:
        raise BadText("empty caption" if are_blank else "no caption", f"no text in {', '.join(sources)}")
    return found


def choose(options: Sequence[str], random: np.random.Generator) -> str:
    """One of the captions, uniformly."""
    return options[int(random.integers(len(options)))]


def _from_text(text: bytes | None, per_line: bool) -> list[str]:
    if text is None:
        return []
    whole = decode(text)
    return lines(whole) if per_line else [whole]


def _from_json(parsed: dict[str, Any], source: str) -> list[str]:
    if source.startswith("json:"):
        value = parsed.get(source.removeprefix("json:"))
        return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    names = re.findall(r"\{(\w+)\}", source)
    if any(not isinstance(parsed.get(name), str | int | float) for name in names):
        return []
    return [re.sub(r"\{(\w+)\}", lambda match: str(parsed[match.group(1)]), source)]
