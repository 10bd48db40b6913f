"""A foreign tokenizer.json as token ids: of known parts only, so that no pattern in it can keep a processor busy."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from amclip_ds.data.captions import WORDS
from amclip_ds.errors import UserError, in_one_line
from amclip_ds.evaluate.export_folder import MAX_VOCABULARY
from amclip_ds.files import read_json
from amclip_ds.model.weight_files import inside

# What ftfy does to punctuation, as far as a tokenizer's own normalizers can: curly quotes and ligatures. Dashes stay.
PUNCTUATION = {
    "[\u02bc\u2018-\u201b]": "'",
    "[\u201c-\u201f]": '"',
    "\ufb00": "ff",
    "\ufb01": "fi",
    "\ufb02": "fl",
    "\ufb03": "ffi",
    "\ufb04": "ffl",
}
PATTERNS = {
    *PUNCTUATION,
    WORDS,
    r"<\|startoftext\|>|<\|endoftext\|>|" + WORDS,
    r"\s+",
    " {2,}",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""The regular expressions that are taken: ours, CLIP's, GPT-2's. Another one may take exponential time."""
PARTS = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "BertNormalizer"},
    "pre_tokenizer": {
        "Split",
        "ByteLevel",
        "Whitespace",
        "WhitespaceSplit",
        "BertPreTokenizer",
        "Metaspace",
        "Digits",
        "Punctuation",
    },
    "post_processor": {"RobertaProcessing", "BertProcessing", "TemplateProcessing", "ByteLevel"},
}
LISTS = ("normalizers", "pretokenizers", "processors")
MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")
MAX_REPLACEMENT = 64  # characters


class ForeignTokenizer:
    """Texts -> ids [B, T], cut and padded to the model's length, each below its vocabulary."""

    def __init__(self, path: Path, length: int, pad_id: int, vocabulary: int) -> None:
        """path: of tokenizer.json. vocabulary: how many ids the model has. Raises UserError."""
        self.path, self.vocabulary = path, vocabulary
        self._tokenizer = _build(path)
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=pad_id)

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        if any(len(row) != len(rows[0]) for row in rows):
            raise UserError(f"{self.path}: gives texts of different lengths")
        largest = max((number for row in rows for number in row), default=0)
        if largest >= self.vocabulary:
            raise UserError(f"{self.path}: gives the token {largest}, and the model has {self.vocabulary}")
        return tensor(rows)


def _build(path: Path) -> Any:
    """The tokenizers.Tokenizer. Raises UserError."""
    from tokenizers import Tokenizer

    content = read_json(inside(path.parent, path), dict)
    _check(path, content)
    try:
        return Tokenizer.from_str(json.dumps(content | dict.fromkeys(("truncation", "padding", "decoder"))))
    except BaseException as error:  # the Rust behind it panics, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{path}: no tokenizer: {in_one_line(error, 200)}") from None


def _check(path: Path, content: dict[str, Any]) -> None:
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: no tokenizer: it has no model")
    for name, known in PARTS.items():
        _check_part(path, name, content.get(name), known)
    model = content["model"]
    if model.get("type", "BPE") not in MODELS:
        raise UserError(f"{path}: model.type: {str(model.get('type'))[:60]!r} is not one of {', '.join(MODELS)}")
    if model.get("dropout"):
        raise UserError(f"{path}: model.dropout: the ids would differ from time to time")
    added = content.get("added_tokens") or []
    vocabulary = model.get("vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else []
    try:
        ids = [*ids, *(token["id"] for token in added)]
    except (TypeError, KeyError):
        raise UserError(f"{path}: added_tokens: not a list of tokens with their ids") from None
    wrong = next((number for number in ids if type(number) is not int or not 0 <= number < MAX_VOCABULARY), None)
    if wrong is not None:
        raise UserError(f"{path}: a token's id is {str(wrong)[:40]!r}")


def _check_part(path: Path, name: str, part: Any, known: set[str]) -> None:
    """Raises UserError for a normalizer or another step that is not known, or may never end."""
    if part is None:
        return
    if not isinstance(part, dict):
        raise UserError(f"{path}: {name}: not a map")
    if part.get("type") == "Sequence":
        steps = next((part[key] for key in LISTS if key in part), None)
        if not isinstance(steps, list) or len(steps) > 64:
            raise UserError(f"{path}: {name}: not a list of steps")
        for step in steps:
            _check_part(path, name, step, known)
        return
    if part.get("type") not in known:
        raise UserError(f"{path}: {name}.type: {str(part.get('type'))[:60]!r} is not one of {', '.join(sorted(known))}")
    pattern = part.get("pattern")
    if isinstance(pattern, dict) and "Regex" in pattern and pattern["Regex"] not in PATTERNS:
        raise UserError(
            f"{path}: {name}.pattern: {str(pattern['Regex'])[:60]!r} is none of the patterns of CLIP's and"
            " GPT's tokenizers, and another may never end"
        )
    if part["type"] == "Replace" and len(str(part.get("content", ""))) > MAX_REPLACEMENT:
        raise UserError(f"{path}: {name}.content: longer than {MAX_REPLACEMENT} characters")
