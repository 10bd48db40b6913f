"""From a sample's text and json members to token ids: which caption, what its text is, how it is encoded."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # the encoder's pattern without special tokens
LONGEST_TEXT, LONGEST_WORD = 1 << 16, 1000  # characters
WORDS_REMEMBERED = 1 << 17
Tokenizer = Callable[[Sequence[str], int], Tensor]


class ClipTokenizer:
    """CLIP's byte-pair encoding (open_clip's vocabulary), lower-cased; a caption cannot inject special tokens.

    open_clip encodes a literal `<|endoftext|>` in a caption as the end token; here it stays plain text.
    """

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer = SimpleTokenizer()
        self._tokenizer.cache.clear()  # holds the special tokens as words of their own
        self.start, self.end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids without start and end; at least the first `limit` of them, if so many are there.

        A word of a thousand characters already fills any context, and pairing bytes takes time with the square of a
        word's length: a megabyte without a space (a blob in a caption) would take hours. Longer ones are cut.
        """
        words = regex.findall(WORDS, self._tokenizer.clean_fn(text[:LONGEST_TEXT]), regex.IGNORECASE)
        if len(self._tokenizer.cache) > WORDS_REMEMBERED:
            self._tokenizer.cache.clear()
        ids: list[int] = []
        for word in words:
            symbols = "".join(self._tokenizer.byte_encoder[byte] for byte in word[:LONGEST_WORD].encode("utf-8"))
            ids += [self._tokenizer.encoder[piece] for piece in self._tokenizer.bpe(symbols).split(" ")]
            if limit is not None and len(ids) >= limit:
                break
        return ids

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> Tensor:
        """[B, context_length] int64: start, words, end, then zeros; a longer text keeps the end in its last place."""
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.start, *self.encode(text, context_length)[: context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows


@functools.cache
def build_tokenizer() -> ClipTokenizer:
    """The tokenizer of every text tower here, one a process."""
    return ClipTokenizer()


def trim(token_ids: Tensor, bucket: int) -> Tensor:
    """Cuts the zeros after the batch's longest text, in steps of `bucket` tokens (0: never); features stay equal."""
    if bucket == 0:
        return token_ids
    columns = torch.arange(1, token_ids.shape[1] + 1)
    longest = int(((token_ids != 0) * columns).max())  # the end token is not 0, though a word ("!") is
    return token_ids[:, : min(token_ids.shape[1], -(-longest // bucket) * bucket)].contiguous()


def candidates(text: bytes | None, fields: bytes | None, sources: Sequence[str], per_line: bool) -> list[str]:
    """Every caption a sample offers, in the order of `sources`.

    A source is `txt`, `json:FIELD` (a text or a list of texts), a template of json fields such as
    `{title}. {description}`, or alternatives joined by `|`, of which the first that yields something counts.
    Raises ValueError for text that is not UTF-8 or json that cannot be read.
    """
    parsed: dict[str, Any] | None = None
    found: list[str] = []
    for source in sources:
        for alternative in source.split("|"):
            if alternative == "txt":
                options = _lines(text, per_line)
            else:
                parsed = _parse(fields) if parsed is None else parsed
                options = _from_json(parsed, alternative)
            if options:
                found += options
                break
    return found


def choose(options: Sequence[str], random: np.random.Generator) -> str:
    """One of the captions, uniformly."""
    return options[int(random.integers(len(options)))]


def _lines(text: bytes | None, per_line: bool) -> list[str]:
    if text is None:
        return []
    whole = text.decode("utf-8")
    return [line.strip() for line in (whole.splitlines() if per_line else [whole]) if line.strip()]


def _parse(fields: bytes | None) -> dict[str, Any]:
    if fields is None:
        return {}
    try:
        parsed = json.loads(fields.decode("utf-8"))
    except RecursionError:
        raise ValueError("the json member is nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("the json member is not an object")
    return parsed


def _from_json(parsed: dict[str, Any], source: str) -> list[str]:
    if source.startswith("json:"):
        value = parsed.get(source.removeprefix("json:"))
        values = value if isinstance(value, list) else [value]
        return [item.strip() for item in values if isinstance(item, str) and item.strip()]
    names = re.findall(r"\{(\w+)\}", source)
    if any(not isinstance(parsed.get(name), str | int | float) for name in names):
        return []
    return [re.sub(r"\{(\w+)\}", lambda match: str(parsed[match.group(1)]), source).strip()]
