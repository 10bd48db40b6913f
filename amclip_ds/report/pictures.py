"""RUN/pictures as the page shows it: the stored images, and what stays of them at some of the steps."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds import run_files
from amclip_ds.errors import UserError
from amclip_ds.files import read_bytes, read_json
from amclip_ds.jsonl import is_number, read_lines

MOST_STEPS, MOST_SAMPLES, MOST_VIEWS = 24, 16, 8
MAX_IMAGE = 1 << 18
MAX_SIDE = 512  # pixels
MAX_GRID = 128


@dataclass
class Picture:
    """One image, with what is over it at each step."""

    name: str
    uri: str
    side: int
    grid: int
    kind: str
    """kept | scores"""
    frames: list[str]
    """by step, in hexadecimal: a bit a patch that stays, or two digits a patch"""
    shown: Any
    """of the last step: an SVG path of what is gone, or an opacity a patch"""


@dataclass
class PicturedSample:
    """A training image."""

    caption: str
    images: list[Picture] = field(default_factory=list)


@dataclass
class Pictures:
    """All of them. steps: of the frames."""

    steps: list[int]
    samples: list[PicturedSample]
    numbers: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    """(step, agreement with the last step's choice, share of the objects' patches that stays)"""


def read_pictures(run: Path) -> Pictures | None:
    """None where the run has stored none, or where what is there is not what a run stores."""
    folder = run / run_files.PICTURES
    try:
        held = read_json(folder / "samples.json", dict)
        rows = read_lines(run / run_files.MASKS, run_files.KEPT)
    except UserError:
        return None
    rows = (
        rows if len(rows) <= MOST_STEPS else [rows[i * (len(rows) - 1) // (MOST_STEPS - 1)] for i in range(MOST_STEPS)]
    )
    grid, masks = held.get("grid"), held.get("masks")
    if not rows or type(grid) is not int or not 0 < grid <= MAX_GRID or not isinstance(masks, list):
        return None
    samples = []
    listed = held.get("samples")
    for place, facts in enumerate(listed[:MOST_SAMPLES] if isinstance(listed, list) else []):
        if isinstance(facts, dict):
            samples.append(_sample(folder, place, facts, rows, grid, masks))
    return Pictures([row["step"] for row in rows], samples, numbers_of(rows))


def numbers_of(rows: list[dict[str, Any]]) -> list[tuple[int, float | None, float | None]]:
    """By row. Agreement: how many of the patches that the last row keeps this one keeps too; of masks that go by the
    teacher's scores, since chance agrees with nothing."""
    found = []
    for row in rows:
        share = row.get("object_share")
        same = agreement(row["kept"], rows[-1]["kept"]) if row.get("scores") else None
        found.append((row["step"], same, share if is_number(share) else None))
    return found if any(same is not None or share is not None for _, same, share in found) else []


def agreement(kept: list[Any], last: list[Any]) -> float | None:
    """Of two rows' choices, the mean over views and images; None where nothing can be compared."""
    shares = []
    for view, final in zip(kept, last):
        for one, other in zip(view, final) if isinstance(view, list) and isinstance(final, list) else []:
            if isinstance(other, str) and _is_hex(other, len(other)) and _is_hex(one, len(other)):
                held = int(other or "0", 16)
                shares.append((int(one or "0", 16) & held).bit_count() / max(1, held.bit_count()))
    return sum(shares) / len(shares) if shares else None


def _sample(
    folder: Path, place: int, facts: dict[str, Any], rows: list[dict[str, Any]], grid: int, masks: list[Any]
) -> PicturedSample:
    sample = PicturedSample(str(facts.get("caption", "")))
    scores = [_at(row.get("scores"), place) for row in rows]
    teacher = facts.get("teacher")
    side = round((len(scores[-1]) / 2) ** 0.5) if isinstance(scores[-1], str) else 0
    if isinstance(teacher, str) and side and all(_is_hex(frame, 2 * side * side) for frame in scores):
        shown = [round(byte / 255, 2) for byte in bytes.fromhex(scores[-1])]
        _add(sample, folder, teacher, "teacher's crop", side, "scores", scores, shown)
    views = facts.get("views")
    for view, name in enumerate(views[:MOST_VIEWS] if isinstance(views, list) else []):
        kept = [_at(_at(row["kept"], view), place) or "f" * -(-grid * grid // 4) for row in rows]
        if isinstance(name, str) and all(_is_hex(frame, -(-grid * grid // 4)) for frame in kept):
            mask = _at(masks, view)
            strategy = mask.get("strategy", "") if isinstance(mask, dict) else ""
            _add(sample, folder, name, f"view {view + 1}: {strategy}", grid, "kept", kept, gone(kept[-1], grid))
    return sample


def _add(
    sample: PicturedSample, folder: Path, file: str, name: str, grid: int, kind: str, frames: list[str], shown: Any
) -> None:
    uri = _uri(folder, file)
    if uri:
        sample.images.append(Picture(name, uri, 112, grid, kind, frames, shown))


def _uri(folder: Path, name: str) -> str:
    """The image's own pixels, encoded anew: whatever else the file held is left behind. Empty where it is none."""
    from amclip_ds.images import kind_of, open_image

    if "/" in name or name.startswith("."):
        return ""
    try:
        content = read_bytes(folder / name, MAX_IMAGE)
        source = open_image(content)
        if kind_of(content) != "WEBP" or max(source.height, source.width) > MAX_SIDE:
            return ""
        held = io.BytesIO()
        source.picture(plain=True).save(held, "WEBP", quality=80)
    except (OSError, ValueError):
        return ""
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode()


def gone(frame: str, grid: int) -> str:
    """The patches that do not stay, as the path of their squares in a grid x grid picture."""
    bits = bin(int("1" + frame, 16))[3:]
    parts = []
    for row in range(grid):
        column = 0
        while column < grid:
            end = column
            while end < grid and bits[row * grid + end] == "0":
                end += 1
            if end > column:
                parts.append(f"M{column} {row}h{end - column}v1h-{end - column}z")
            column = end + 1
    return "".join(parts)


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and 0 <= place < len(values) else None


def _is_hex(text: Any, length: int) -> bool:
    return isinstance(text, str) and len(text) == length and all(letter in "0123456789abcdef" for letter in text)
