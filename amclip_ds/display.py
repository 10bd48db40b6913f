"""Texts of other people on a screen and in a model card: class names, captions, file names, keys, settings.

What such a text holds is shown, never obeyed: no escape sequence reaches a terminal, no mark turns the direction of a
line, and nothing becomes markup, a link, a table's cell or the end of a code block.
"""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Control characters but newline and tab; marks of direction; line and paragraph separators; byte order mark; tags.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


WIDEST = 100_000  # columns of a table in a file or a pipe


def printable(text: object) -> str:
    """The text with what a terminal would obey written out: `\\x1b`, `\\u202e`."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """The same with newlines and tabs written out as well."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def code(text: object) -> str:
    """A code span of markdown, good in a table too: nothing in it is markup."""
    shown = one_line(text).replace("|", "\\|")
    fence = _fence(shown, 1)
    pad = " " if "`" in shown or not shown.strip() else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def code_block(text: object, language: str = "") -> list[str]:
    """The lines of a fenced block that the text cannot end."""
    shown = printable(text)
    fence = _fence(shown, 3)
    return [fence + language, *shown.split("\n"), fence]


def _fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table on standard output. Nothing of it is cut: what has no space continues in the next line, and
    where there is no terminal a row is one line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(one_line(title)))
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    screen = console()
    if not screen.is_terminal:
        screen.width = WIDEST
    screen.print(table)


def duration(seconds: float) -> str:
    """`41 s`, `7 min 5 s`, `3 h 12 min`, `2 d 4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // below:.0f} {small}"
    return f"{seconds:.0f} s"


def console() -> Any:
    """rich's console on standard output. Its own colours pass a Screen; what it is given must be `printable`."""
    import sys

    from rich.console import Console

    raw: Any = _Raw(sys.stdout) if isinstance(sys.stdout, Screen) else None
    return Console(file=raw, markup=False, highlight=False)


class Screen(io.TextIOWrapper):
    """A standard stream through which every text goes as `printable` shows it."""

    def write(self, text: str) -> int:
        """What is written, in characters of the text given."""
        super().write(printable(text))
        return len(text)

    def write_raw(self, text: str) -> int:
        """For sequences of our own."""
        return super().write(text)


class _Raw:
    """A Screen's other side."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.write = screen.write_raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)
