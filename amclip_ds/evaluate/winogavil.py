"""WinoGAViL: a cue, 5 to 12 pictures, and which of them people associate with it.

    DIR/winogavil_dataset.csv           columns cue, candidates, associations; the last two lists of names, as JSON
    DIR/winogavil_images/eagle.jpg      a picture for each name; DIR/images or DIR itself may hold them too

No torch. A game that cannot be scored is a UserError that names its line; none is left out.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from amclip_ds.errors import UserError
from amclip_ds.evaluate import folders
from amclip_ds.files import is_regular, read_text
from amclip_ds.shards.tar import printable

TABLE, PICTURES, ARCHIVE = "winogavil_dataset.csv", ("winogavil_images", "images", ""), "winogavil_images.zip"
COLUMNS = ("cue", "candidates", "associations")
MAX_TABLE = 64 << 20  # bytes
MAX_CANDIDATES = 1000


@dataclass(frozen=True)
class Game:
    """One cue and its pictures."""

    cue: str
    candidates: tuple[int, ...]
    """numbers of the set's images"""
    associated: tuple[bool, ...]
    """of each candidate, whether it belongs to the cue"""

    @property
    def prompt(self) -> str:
        """`A cue`, or `An` before a vowel, in lower case, as DataComp's evaluation writes it."""
        word = self.cue.lower()
        return f"{'An' if word[0] in 'aeiou' else 'A'} {word}"


def table_in(folder: Path) -> Path | None:
    """The table of games that a folder holds: winogavil_dataset.csv, or its only .csv with those columns."""
    if not folder.is_dir():
        return None
    if is_regular(folder / TABLE):
        return folder / TABLE
    found = [path for path in sorted(folder.glob("*.csv")) if is_regular(path) and _has_columns(path)]
    return found[0] if len(found) == 1 else None


def read(table: Path) -> tuple[list[Path], tuple[Game, ...]]:
    """(the images, each once, in the order in which they are first named; the games). Raises UserError."""
    folder = table.parent
    folders.check_inside(table, folder)
    home = _home_of_pictures(folder)
    numbers: dict[str, int] = {}
    images: list[Path] = []
    games: list[Game] = []
    try:
        for row in csv.DictReader(io.StringIO(read_text(table, MAX_TABLE).removeprefix("\ufeff"), newline="")):
            place = f"{table}: game {len(games) + 1}"
            candidates, associations = _names(row, "candidates", place), _names(row, "associations", place)
            cue = (row.get("cue") or "").strip()
            if not cue:
                raise UserError(f"{place} has no cue")
            if foreign := [name for name in associations if name not in candidates]:
                raise UserError(f"{place}: {printable(foreign[0])!r} is associated and no candidate")
            for name in candidates:
                if name not in numbers:
                    image = folders.image_named(home, name)
                    if image is None:
                        raise UserError(f"{place} names {printable(name)!r}, and {home} holds no such image")
                    numbers[name] = len(images)
                    images.append(image)
            games.append(
                Game(
                    cue, tuple(numbers[name] for name in candidates), tuple(name in associations for name in candidates)
                )
            )
    except csv.Error as error:
        raise UserError(f"{table}: {error}") from None
    if not games:
        raise UserError(f"{table}: no game in it; its columns are {', '.join(COLUMNS)}")
    return images, tuple(games)


def _has_columns(path: Path) -> bool:
    with path.open("rb") as file:
        heading = file.readline(4096).decode("utf-8", "replace")
    try:
        return set(COLUMNS) <= set(next(csv.reader([heading.removeprefix("\ufeff")]), []))
    except csv.Error:
        return False


def _home_of_pictures(folder: Path) -> Path:
    for name in PICTURES:
        if (folder / name).is_dir() and folders.has_images(folder / name):
            return folder / name
    if is_regular(folder / ARCHIVE):
        raise UserError(f"{folder / ARCHIVE} is still packed: unzip it there")
    raise UserError(f"{folder}: no images; they belong into {folder / PICTURES[0]}, one for each candidate's name")


def _names(row: dict[str, str], column: str, place: str) -> list[str]:
    """The names in a cell. Raises UserError where they are none, twice there, or no list of texts."""
    try:
        found = json.loads(row.get(column) or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{place}: {column} is no list of names in JSON")
    if not 0 < len(found) <= MAX_CANDIDATES or len(set(found)) < len(found):
        raise UserError(f"{place}: {column} holds {len(found)} names, {len(set(found))} different ones")
    return found
