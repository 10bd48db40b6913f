"""The table that a text mask reads: of each word its count (`amclip data stats SHARDS --words`), or its class.

A json file: {"format": 1, "tokenizer": HASH, "counts": {"the": 529, ...}}, or
{"format": 1, "classes": {"car": "noun", "red": "adjective", "parked": "verb"}}, words in lower case.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds import files
from amclip_ds.errors import UserError

FORMAT = 1
MAX_BYTES = 1 << 30
CLASSES = ("noun", "adjective", "verb", "other")  # in the order in which they stay
HOW = {
    "counts": "`amclip data stats SHARDS --words TABLE.json` makes one",
    "classes": "see amclip_ds/masks/text/table.py",
}


@dataclass(frozen=True)
class Table:
    words: dict[str, Any]
    """word -> count, or class"""
    tokenizer: str
    """what the words were split with (data.captions.tokenizer_hash); empty: not said"""
    hash: str
    """sha256 of the file"""


def read(path: str, holds: str) -> Table:
    """holds: counts or classes. Raises UserError, in one line, for a file that is no such table."""
    try:
        content = files.read_bytes(Path(path), MAX_BYTES)
        held = json.loads(content)
    except OSError as error:
        raise files.not_read(f"data.text_mask.table: {path}", error) from None
    except (ValueError, RecursionError):
        raise UserError(f"data.text_mask.table: {path}: not a json file") from None
    words = held.get(holds) if isinstance(held, dict) else None
    tokenizer = held.get("tokenizer", "") if isinstance(held, dict) else ""
    if not isinstance(words, dict) or held.get("format") != FORMAT or not isinstance(tokenizer, str):
        raise UserError(f"data.text_mask.table: {path}: no table of words with their {holds}; {HOW[holds]}")
    for word, value in words.items():
        if holds == "counts" and not (type(value) is int and value > 0):
            raise UserError(f"data.text_mask.table: {path}: the count of {word[:40]!r} is no whole number above 0")
        if holds == "classes" and value not in CLASSES:
            raise UserError(f"data.text_mask.table: {path}: the class of {word[:40]!r} is none of {', '.join(CLASSES)}")
    return Table(words, tokenizer, hashlib.sha256(content).hexdigest())
