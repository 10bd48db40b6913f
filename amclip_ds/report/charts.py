"""Lines over steps as SVG paths in whole numbers, few enough for any browser; page.js reads the numbers back of them.

A chart's area is WIDE x HIGH whatever it shows; the page stretches it. A line of more rows than BUCKETS is drawn as the
means of equal parts, with the area between their least and largest values behind it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDE, HIGH = 10_000, 2_000
BUCKETS = 700
FEW = 60
Point = tuple[float, float, float, float]
"""step, mean, least, largest"""


@dataclass
class Line:
    """One series of a chart."""

    name: str
    path: str
    band: str
    last: float
    style: int
    """which of the page's colours and dashes"""
    dots: str
    """the values as points, where they are few"""


@dataclass
class Chart:
    """What page.html draws; x in steps, y in the unit (its logarithm to base 10 where is_log)."""

    id: str
    title: str
    unit: str
    x0: float
    x1: float
    y0: float
    y1: float
    is_log: bool
    lines: list[Line] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    """place in percent, and what is there"""
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    """rows of numbers in words: the same for those who cannot see it"""
    note: str = ""


def buckets(steps: Sequence[int], values: Sequence[float], most: int = BUCKETS) -> list[Point | None]:
    """The finite values of equal parts of the steps; None where a part holds only values that are none: a gap."""
    if not steps:
        return []
    if len(steps) <= most:
        return [(step, y, y, y) if math.isfinite(y) else None for step, y in zip(steps, values)]
    first, width = steps[0], max(1, steps[-1] - steps[0] + 1) / most
    sums: dict[int, list[float]] = {}
    gaps: set[int] = set()
    for step, y in zip(steps, values):
        place = int((step - first) / width)
        if not math.isfinite(y):
            gaps.add(place)
        elif place in sums:
            held = sums[place]
            held[0] += step
            held[1] += y
            held[2], held[3], held[4] = min(held[2], y), max(held[3], y), held[4] + 1
        else:
            sums[place] = [step, y, y, y, 1]
    found: list[Point | None] = []
    for place in sorted({*sums, *gaps}):
        held = sums.get(place, [])
        found.append((held[0] / held[4], held[1] / held[4], held[2], held[3]) if held else None)
    return found


def draw(
    id: str,
    title: str,
    unit: str,
    series: Iterable[tuple[str, list[Point | None]]],
    *,
    steps: tuple[float, float],
    is_log: bool = False,
    from_zero: bool = False,
    note: str = "",
) -> Chart | None:
    """A chart of named lines between two steps; None where no line has a value (or, in logarithms, one above 0)."""
    named = [(name, [_logarithm(point) if is_log else point for point in points]) for name, points in series]
    named = [(name, points) for name, points in named if any(points)]
    if not named:
        return None
    values = [value for _, points in named for point in points if point for value in point[2:]]
    y0, y1 = _room(min(values), max(values), from_zero and not is_log)
    x0, x1 = steps[0], max(steps[1], steps[0] + 1)
    chart = Chart(id, title, unit, x0, x1, y0, y1, is_log, note=note)
    for style, (name, points) in enumerate(named):
        chart.lines.append(_line(name, points, chart, style))
    chart.x_ticks = [((x - x0) / (x1 - x0) * 100, number(x)) for x in ticks(x0, x1, 6)]
    chart.y_ticks = [((y1 - y) / (y1 - y0) * 100, number(10**y if is_log else y)) for y in ticks(y0, y1, 5, is_log)]
    chart.table = _table(named, is_log)
    return chart


def ticks(low: float, high: float, about: int, is_log: bool = False) -> list[float]:
    """Round numbers between two; of logarithms, those of 1, 2 and 5 times powers of ten, or of every so many powers."""
    if is_log and high - low < 2.5:
        powers = range(math.floor(low), math.floor(high) + 1)
        found = [power + math.log10(factor) for power in powers for factor in (1, 2, 5)]
        return [place for place in found if low <= place <= high]
    raw = (high - low) / max(1, about)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw)
    if is_log:
        step = math.ceil(step)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number as people write it, four digits."""
    if not math.isfinite(value):
        return "none"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value:.3g}", "")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _logarithm(point: Point | None) -> Point | None:
    return (point[0], *(math.log10(value) for value in point[1:])) if point and min(point[1:]) > 0 else None  # type: ignore[return-value]


def _room(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """The range with a little room around it."""
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    spread = high - low or abs(high) or 1.0
    return low - (0 if from_zero and low == 0 else 0.04 * spread), high + 0.04 * spread


def _line(name: str, points: list[Point | None], chart: Chart, style: int) -> Line:
    def at(x: float, y: float) -> tuple[int, int]:
        return (
            round((x - chart.x0) / (chart.x1 - chart.x0) * WIDE),
            round((chart.y1 - y) / (chart.y1 - chart.y0) * HIGH),
        )

    runs: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    runs = [run for run in runs if run]
    path = "".join(_path([at(point[0], point[1]) for point in run]) for run in runs)
    is_thick = any(point[2] != point[3] for run in runs for point in run)
    band = (
        "".join(_path([at(p[0], p[3]) for p in run] + [at(p[0], p[2]) for p in reversed(run)]) + "z" for run in runs)
        if is_thick
        else ""
    )
    last = runs[-1][-1][1]
    places = [at(point[0], point[1]) for run in runs for point in run]
    dots = "".join(f"M{x} {y}l0 0" for x, y in places) if len(places) <= FEW else ""
    return Line(name, path, band, 10**last if chart.is_log else last, style, dots)


def _path(places: list[tuple[int, int]]) -> str:
    """`M x y`, then steps relative to the place before; a point alone is a line to itself."""
    (x, y), rest = places[0], places[1:]
    parts = [f"M{x} {y}"]
    for next_x, next_y in rest or [(x, y)]:
        parts.append(f"l{next_x - x} {next_y - y}")
        x, y = next_x, next_y
    return "".join(parts)


def _table(named: list[tuple[str, list[Point | None]]], is_log: bool, rows: int = 8) -> list[list[str]]:
    """The header and some rows, evenly over the steps."""
    steps = sorted({point[0] for _, points in named for point in points if point})
    chosen = steps if len(steps) <= rows else [steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)]
    by_step = [{point[0]: point[1] for point in points if point} for _, points in named]
    found = [["step", *(name for name, _ in named)]]
    for step in chosen:
        cells = [number(10 ** held[step] if is_log else held[step]) if step in held else "" for held in by_step]
        found.append([number(step), *cells])
    return found
