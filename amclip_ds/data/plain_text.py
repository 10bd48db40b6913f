"""The text of a file as its reader sees it: its encoding, its lines, whether it is blank, json fields."""

import codecs
import html
import json
import re
from collections.abc import Sequence
from typing import Any

import regex

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LINE_ENDS = r"\r\n|\r|\n"  # as editors show them
OTHER_BREAKS = r"[\v\f\x1c-\x1e\x85\u2028\u2029]"  # str.splitlines ends a line there too: white space in a text
SEEN = r"[^\p{Z}\p{Cc}\p{Cf}\p{Cs}\p{Default_Ignorable_Code_Point}\u2800]"  # U+2800: Braille without a dot


class BadText(ValueError):
    """A text that is absent, blank or cannot be read; its words are the same for the same fault."""

    def __init__(self, kind: str, cause: str) -> None:
        super().__init__(cause)
        self.kind = kind
        """no caption | empty caption | not utf-8 | bad json"""


def decode(content: bytes) -> str:
    """UTF-8, or what the byte-order mark says. Raises BadText for any other encoding: none is guessed."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise BadText("not utf-8", f"a text that is not {encoding.removesuffix('-sig').upper()}") from None


def lines(text: str) -> list[str]:
    """What is between LF, CR or both."""
    return re.split(LINE_ENDS, text)


def visible(texts: Sequence[str]) -> list[str]:
    """The texts without white space around them, odd breaks in them as spaces; without those that are blank."""
    return [re.sub(OTHER_BREAKS, " ", text).strip() for text in texts if not is_blank(text)]


def is_blank(text: str) -> bool:
    """Whether a reader sees nothing: white space, NULs and other controls, zero-width characters, fillers; or such
    written as HTML, which the tokenizer resolves."""
    if text[:1].isascii() and text[:1].isalnum():  # nearly every caption
        return False
    return regex.search(SEEN, html.unescape(html.unescape(text))) is None


def parse_object(content: bytes) -> dict[str, Any]:
    """The fields of a json object. Raises BadText."""
    text = decode(content)
    try:
        parsed = json.loads(text)
    except RecursionError:
        raise BadText("bad json", "json that is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise BadText("bad json", f"json that cannot be read: {error.msg}") from None
    except ValueError:
        raise BadText("bad json", "json with a number of thousands of digits") from None
    if not isinstance(parsed, dict):
        raise BadText("bad json", "json that is no object")
    return parsed
