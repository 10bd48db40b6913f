"""Rows of a run, one JSON object a line: append, read, and set aside what a resume writes again.

    append_line(path, row)                  # one write; a torn line before it stays a line of its own
    rows, unreadable = read(path, STEP)     # what cannot be read is counted and stays in the file
    supersede(path, step)                   # later rows go to NAME.superseded.jsonl, no rows to NAME.unreadable.txt

Lines end at b"\\n" alone (a caption may hold U+2028), and a row is a dict with the fields that its readers need.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from amclip_ds.errors import UserError
from amclip_ds.files import not_read, open_regular, open_to_append, removed_on_error
from amclip_ds.redact import redact
from amclip_ds.run_files import STEP

KEPT, LATE, UNREADABLE = "kept", "superseded", "unreadable"
BLANK = b"\0\r\n\t "
MAX_LINE = 16 << 20
MAX_READ = 64 << 20  # of rows that are held in memory together, which takes ten times as much


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON line with a single write, so that several processes may append to the same file.

    Raises OSError where not all of it was written; what was, is a torn line, and the next row begins a line of its own.
    """
    append(path, encode(row))


def encode(row: dict[str, Any]) -> bytes:
    """The row as a line. A value that is not finite becomes null, since strict JSON has no NaN; secrets in strings
    become ***."""
    line = json.dumps(_strict(row), ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace")  # half of a surrogate pair stays a JSON escape


def append(path: Path, content: bytes) -> None:
    """Appends whole lines. Raises OSError as `append_line` does; a row of which only the end of its line is missing
    counts as written, since the next one brings it."""
    descriptor = open_to_append(path)
    try:
        content = _end_of_torn_line(descriptor) + content
        written = os.write(descriptor, content)
        while written < len(content) - 1:  # the disk is full (this raises), or a signal came between
            written += os.write(descriptor, content[written:])
    finally:
        os.close(descriptor)


def _end_of_torn_line(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, str):
        return redact(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path, fields: Mapping[str, type] = {}, limit: int = MAX_READ) -> list[dict[str, Any]]:
    """The rows that have all the `fields` with values of their types; none if there is no file. Raises UserError."""
    return read(path, fields, limit)[0]


def is_number(value: Any) -> bool:
    """Whether a parsed value is a finite number; true and false are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # isfinite raises for a larger int


def read(path: Path, fields: Mapping[str, type] = {}, limit: int = MAX_READ) -> tuple[list[dict[str, Any]], int]:
    """Such rows, and how many lines are none (a last one without an end may still be written, and is not counted).

    Raises UserError where there is no ordinary file, or too large a one.
    """
    rows: list[dict[str, Any]] = []
    unreadable = size = 0
    try:
        for line, is_whole in lines(path):
            size += len(line)
            if size > limit:
                raise UserError(f"{path}: more than the {limit} bytes that such a file may have")
            row = parse(line, fields) if is_whole else None
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n"):
                unreadable += 1
    except OSError as error:
        raise not_read(str(path), error) from None
    return rows, unreadable


def each(path: Path, fields: Mapping[str, type] = {}) -> Iterator[dict[str, Any]]:
    """Such rows one at a time, of a file of any size; none if there is no file. Raises UserError."""
    try:
        for line, is_whole in lines(path):
            row = parse(line, fields) if is_whole else None
            if row is not None:
                yield row
    except OSError as error:
        raise not_read(str(path), error) from None


def left_out(path: Path, unreadable: int) -> list[str]:
    """What a reader of a run's rows says of the lines that it could not read: one line, or none."""
    return [f"{path}: {unreadable} line(s) cannot be read and are left out"] if unreadable else []


def lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The lines that are not blank, and whether each is whole: one above MAX_LINE comes in parts. Raises OSError."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        is_part = False
        while line := file.readline(MAX_LINE):
            is_cut = len(line) == MAX_LINE and not line.endswith(b"\n")
            if line.strip(BLANK):
                yield line, not (is_part or is_cut)
            is_part = is_cut


def parse(line: bytes, fields: Mapping[str, type] = {}) -> dict[str, Any] | None:
    """The row of a line; None where it is no JSON object, holds a whole number beyond 64 bits, which nothing counts, or
    lacks one of the fields."""
    try:
        text = line.strip(BLANK).decode()  # NUL bytes: of blocks that a crash left unwritten
        row = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    return row if all(_is_of(row.get(name), kind) for name, kind in fields.items()) else None


def _whole(digits: str) -> int:
    number = int(digits)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("a whole number beyond 64 bits")
    return number


def _is_of(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def superseded(name: str) -> str:
    """The file beside this one to which `supersede` moves rows."""
    return f"{name.removesuffix('.jsonl')}.superseded.jsonl"


def supersede(path: Path, step: int) -> int:
    """Sets aside, before a resume writes those steps again, the rows of steps after `step`, and lines that are no rows
    with a step. Returns how many of the latter. Every line is kept byte for byte. Raises OSError.
    """
    places = [place for line, is_whole in lines(path) if (place := _place_of(line, is_whole, step)) != KEPT]
    if not places:
        return 0
    asides = {
        LATE: path.with_name(superseded(path.name)),
        UNREADABLE: path.with_name(f"{path.stem}.unreadable.txt"),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(removed_on_error(partial))
        files = {
            name: stack.enter_context(os.fdopen(open_to_append(to), "ab"))
            for name, to in (asides | {KEPT: partial}).items()
            if name in {KEPT, *places}
        }
        for file in files.values():
            file.write(_end_of_torn_line(file.fileno()))
        for line, is_whole in lines(path):
            file = files[_place_of(line, is_whole, step)]
            file.write(line if line.endswith(b"\n") or not is_whole else line + b"\n")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    return places.count(UNREADABLE)


def _place_of(line: bytes, is_whole: bool, step: int) -> str:
    row = parse(line, STEP) if is_whole else None
    if row is None:
        return UNREADABLE
    return LATE if row["step"] > step else KEPT
