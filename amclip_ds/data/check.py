"""Looks at every sample of a set of shards before a run, and accounts for each: read, skipped or lost.

expected = read + skipped + lost, always. Expected is what a `sizes.json` or img2dataset's `NAME_stats.json` beside the
shards promises, else what the tar itself shows: samples begun, and those that damage has visibly swallowed.
"""

import functools
import hashlib
import statistics
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from amclip_ds.data import captions as caption_sources
from amclip_ds.data import index, reader
from amclip_ds.data.config import DataConfig, check_sources
from amclip_ds.data.images import BadImage, open_image
from amclip_ds.data.keyed_random import keyed
from amclip_ds.data.parallel import Died, run_over
from amclip_ds.data.tar import BLOCK, Damage, Member, scan, split_name
from amclip_ds.errors import UserError
from amclip_ds.files import read_json

TRAINING = DataConfig()  # what training would do unless told otherwise
# What a sample can be skipped for, in the order looked at; what makes it lost; what is only worth knowing.
SKIPPED = ("no image", "too large", "broken image", "no caption", "empty caption", "not utf-8", "bad json")
LOST = ("unreadable", "empty", "truncated", "header", "name", "swallowed", "fewer than promised", "crash")
NOTED = ("zeros", "duplicate", "duplicate key", "mended image", "too small", "aspect", "hostile name")
SMALL_SIDE = 32
DECODED_SIDE = 224  # a large JPEG is decoded at the reduced scale that leaves at least this
EXTREME_ASPECT = 5.0
CAPTIONS_TO_TOKENISE = 4000  # of the whole set: enough for percentiles
MEASURED = np.dtype(
    [
        ("hash", "<u8"), ("width", "<u4"), ("height", "<u4"), ("image_bytes", "<u4"), ("format", "u1"),
        ("captions", "<u2"), ("characters", "<u4"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class CheckConfig:
    """What is looked at."""

    captions: tuple[str, ...] = tuple(TRAINING.captions)
    """Where captions come from, as in data.captions."""
    caption_per_line: bool = TRAINING.caption_per_line
    sample: float = 1.0
    """The part of the samples whose contents are read; headers of all are."""
    decode: bool = True
    """Decode the images; False stops at their headers."""
    max_pixels: int = TRAINING.max_pixels
    """A larger image is refused by its header."""
    max_skip_rate: float = TRAINING.max_skip_rate
    """More than this part skipped or doubled makes a shard, and the whole, not fit to submit."""

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise UserError(f"--sample: {self.sample} is outside (0, 1]")
        if not 0 <= self.max_skip_rate <= 1:
            raise UserError(f"--max-skip-rate: {self.max_skip_rate} is outside [0, 1]")
        try:
            check_sources(self.captions)
        except ValueError as error:
            raise UserError(str(error).removeprefix("data.")) from None


@dataclass
class ShardReport:
    """What a check found in one shard."""

    path: str
    samples: int = 0
    """in the tar, whether looked at or not"""
    expected: int = 0
    read: int = 0
    skipped: int = 0
    lost: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    problems: dict[str, tuple[str, int]] = field(default_factory=dict)
    """kind -> (key of the first, count)"""
    causes: Counter[str] = field(default_factory=Counter)
    """why broken images could not be read -> count"""
    measured: np.ndarray = field(default_factory=lambda: np.empty(0, MEASURED))
    """a row a sample read"""
    keys: bytes = b""
    """their keys, joined by newlines, compressed"""
    texts: list[str] = field(default_factory=list)
    """some captions, to be tokenised"""

    def add(self, kind: str, key: str, count: int = 1) -> None:
        """Counts a problem."""
        first, before = self.problems.get(kind, (key, 0))
        self.problems[kind] = (first, before + count)

    def is_ok(self, max_skip_rate: float) -> bool:
        """Whether it can be trained on: nothing lost, and few enough samples skipped or doubled."""
        bad = self.skipped + self.problems.get("duplicate", ("", 0))[1]
        return not any(kind in self.problems for kind in LOST) and bad <= max_skip_rate * self.expected


@dataclass
class Report:
    """What a check found in all shards."""

    config: CheckConfig
    shards: list[ShardReport]

    def total(self, name: str) -> int:
        """Sum over the shards of expected, read, skipped, lost, samples or num_bytes."""
        return sum(getattr(shard, name) for shard in self.shards)

    @property
    def ok(self) -> bool:
        """Whether to submit."""
        rate = self.config.max_skip_rate
        bad = self.total("skipped") + sum(shard.problems.get("duplicate", ("", 0))[1] for shard in self.shards)
        return self.total("read") > 0 and self.total("lost") == 0 and bad <= rate * self.total("expected") and not any(
            kind in shard.problems for shard in self.shards for kind in LOST
        )  # fmt: skip

    def problems(self) -> Counter[str]:
        """Counts by kind."""
        totals: Counter[str] = Counter()
        for shard in self.shards:
            totals.update({kind: count for kind, (_, count) in shard.problems.items()})
        return totals

    def causes(self) -> Counter[str]:
        """Why images could not be read, with counts."""
        return sum((shard.causes for shard in self.shards), Counter())

    def measured(self) -> np.ndarray:
        """A row for each sample read, of all shards."""
        return np.concatenate([np.empty(0, MEASURED), *(shard.measured for shard in self.shards)])

    def samples_per_core_second(self) -> float:
        """How fast one core read and, if asked, decoded them."""
        seconds = sum(shard.seconds for shard in self.shards)
        return (self.total("read") + self.total("skipped")) / seconds if seconds else 0.0

    def samples_in_an_epoch(self) -> int:
        """Samples that training would read: all that a full check read, or a sampled one's share of all."""
        looked_at = self.total("read") + self.total("skipped")
        return round(self.total("samples") * self.total("read") / looked_at) if looked_at else 0

    def verdict(self) -> str:
        """The account in one line."""
        part = f" (a sample of {self.config.sample:.3g})" if self.config.sample < 1 else ""
        numbers = ", ".join(f"{name} {self.total(name)}" for name in ("expected", "read", "skipped", "lost"))
        return f"{len(self.shards)} shards, {numbers}{part}"

    def as_json(self) -> dict[str, Any]:
        """The record that scripts read (design: `data check --json`)."""
        shards = [
            {
                "path": shard.path, "ok": shard.is_ok(self.config.max_skip_rate), "samples": shard.samples,
                "problems": [{"kind": k, "key": key, "count": n} for k, (key, n) in shard.problems.items()],
                "expected": shard.expected, "read": shard.read, "skipped": shard.skipped, "lost": shard.lost,
                "causes": dict(shard.causes),
            }
            for shard in self.shards
        ]  # fmt: skip
        totals = {name: self.total(name) for name in ("expected", "read", "skipped", "lost", "samples", "num_bytes")}
        more = {"ok": self.ok, "samples_per_core_second": self.samples_per_core_second(), "config": asdict(self.config)}
        return {"shards": shards} | totals | more


def check(
    shards: list[str],
    config: CheckConfig,
    processes: int,
    on_shard: Callable[[ShardReport], None] = lambda report: None,
) -> Report:
    """Checks the shards in parallel. Whatever they hold, it returns: damage is reported, never raised."""
    texts = -(-CAPTIONS_TO_TOKENISE // len(shards))
    reports = []
    for shard, found in zip(shards, run_over(functools.partial(check_shard, config, texts), shards, processes)):
        if isinstance(found, Died):
            report = ShardReport(shard)
            report.add("crash", str(found))
        else:
            report = found
        reports.append(report)
        on_shard(report)
    _keep_promises(reports)
    _find_duplicates(reports)
    return Report(config, reports)


def check_shard(config: CheckConfig, num_texts: int, shard: str) -> ShardReport:
    """Checks one shard."""
    report, began = ShardReport(shard), time.perf_counter()
    try:
        with reader.open_shard(shard) as (file, size, _):
            report.num_bytes = size
            _Pass(config, num_texts, report, file).run(size)
    except OSError as error:
        report.add("unreadable", error.strerror or str(error))
    report.expected = report.read + report.skipped + report.lost
    report.seconds = time.perf_counter() - began
    return report


@dataclass
class _Group:
    """Consecutive members with the same key: a sample."""

    key: str
    members: dict[str, Member]
    """suffix -> member"""
    at_damage: bool
    """a neighbour of damage: what is missing here is lost, not left out"""


class _Pass:
    """One reading of one shard."""

    def __init__(self, config: CheckConfig, num_texts: int, report: ShardReport, file: BinaryIO) -> None:
        self._config, self._report, self._file = config, report, file
        self._num_texts, self._random = num_texts, keyed(0, "check", report.path)
        self._rows: list[tuple] = []
        self._keys: list[str] = []

    def run(self, size: int) -> None:
        report = self._report
        groups = self._groups(size)
        report.samples = len(groups)
        if not groups and not report.problems:
            report.add("empty", "no members")
        for key, count in Counter(group.key for group in groups).items():
            if count > 1:
                report.add("duplicate key", key, count - 1)
        for group in groups:
            if group.at_damage or self._config.sample >= 1 or self._random.random() < self._config.sample:
                self._look_at(group)
        report.measured = np.array(self._rows, dtype=MEASURED)
        report.keys = zlib.compress("\n".join(key.replace("\n", " ") for key in self._keys).encode(*UTF8))

    def _groups(self, size: int) -> list[_Group]:
        """The samples of the tar; counts as lost what damage has swallowed whole."""
        groups: list[_Group] = []
        damages: list[tuple[int, Damage]] = []
        for item in scan(self._file, size):
            if isinstance(item, Damage):
                self._report.add(item.kind, item.cause)
                damages.append((len(groups), item))
                if groups:
                    groups[-1].at_damage = True
                continue
            key, suffix = split_name(item.name)
            if not key:
                continue
            after_damage = bool(damages) and damages[-1][0] == len(groups)
            if not groups or groups[-1].key != key or suffix in groups[-1].members:
                groups.append(_Group(key, {}, after_damage))
            elif after_damage:
                groups[-1].at_damage = True
            groups[-1].members[suffix] = item
        self._count_swallowed(groups, damages)
        return groups

    def _count_swallowed(self, groups: list[_Group], damages: list[tuple[int, Damage]]) -> None:
        """Counts as lost the samples of which damage has left nothing: by its size, and at least one, unless a sample
        beside it lacks a member, which explains it."""
        if not groups:
            return
        usual = Counter(tuple(sorted(group.members)) for group in groups).most_common(1)[0][0]
        sizes = [sum(BLOCK + -(-m.size // BLOCK) * BLOCK for m in group.members.values()) for group in groups]
        for place, damage in damages:
            around = groups[max(0, place - 1) : place + 1]
            incomplete = sum(bool(set(usual) - set(group.members)) for group in around)
            swallowed = round(damage.num_bytes / statistics.median(sizes)) - incomplete
            if damage.kind in ("header", "truncated") and not incomplete:
                swallowed = max(swallowed, 1)
            elif damage.kind == "zeros" and not incomplete:
                swallowed = 0  # joined tars; what a hole between whole samples held, nothing here can tell
            if swallowed > 0:
                self._report.lost += swallowed
                self._report.add("swallowed", f"by damage at byte {damage.offset}", swallowed)

    def _look_at(self, group: _Group) -> None:
        report = self._report
        problem, row = self._problem_of(group)
        if problem == "no image" and group.at_damage:
            report.lost += 1
            report.add("swallowed", group.key)
        elif problem:
            report.skipped += 1
            report.add(problem, group.key)
        else:
            report.read += 1
            self._rows.append(row)
            self._keys.append(group.key)
        if is_hostile(group.key):
            report.add("hostile name", group.key)

    def _problem_of(self, group: _Group) -> tuple[str, tuple]:
        """Why a sample would be skipped ("" if it would not), and its row of measurements."""
        suffix = next((s for s in group.members if is_image(s)), None)
        if suffix is None:
            return "no image", ()
        image = group.members[suffix]
        if index.is_oversized(image, list(group.members.values())):
            return "too large", ()
        try:
            height, width, digest = self._image(group.key, image)
        except BadImage as error:
            if error.kind == "too large":
                return "too large", ()
            self._report.causes[str(error)] += 1
            return "broken image", ()
        problem, options = self._captions(group)
        if problem:
            return problem, ()
        if min(width, height) < SMALL_SIDE:
            self._report.add("too small", group.key)
        if max(width, height) > EXTREME_ASPECT * min(width, height):
            self._report.add("aspect", group.key)
        self._keep_text(options)
        kind = index.IMAGE_TYPES[f".{suffix.rpartition('.')[2]}"]
        return "", (digest, width, height, image.size, kind, min(len(options), 65535), len(options[0]))

    def _image(self, key: str, image: Member) -> tuple[int, int, int]:
        """(height, width, hash), decoded as training does if asked. Raises BadImage."""
        if not self._config.decode:
            width, height = index.image_size(self._file, image)
            if width * height > self._config.max_pixels or width == 0:
                raise BadImage("too large" if width else "unreadable", "a header that cannot be read")
            return height, width, 0
        content = self._read(image)
        source = open_image(content, self._config.max_pixels)
        if source.decode(min(source.height, source.width) / DECODED_SIDE).mended:
            self._report.add("mended image", key)
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return source.height, source.width, int.from_bytes(digest, "little")

    def _captions(self, group: _Group) -> tuple[str, list[str]]:
        """The captions a sample offers, or why there are none."""
        text, fields = group.members.get("txt"), group.members.get("json")
        if not text and not fields:
            return "no caption", []
        raw_text, raw_fields = (self._read(member) if member else None for member in (text, fields))
        try:
            options = caption_sources.candidates(
                raw_text, raw_fields, self._config.captions, self._config.caption_per_line
            )
        except UnicodeDecodeError:
            return "not utf-8", []
        except ValueError:
            return "bad json", []
        if options:
            return "", options
        return ("empty caption" if text else "no caption"), []

    def _keep_text(self, options: list[str]) -> None:
        """A few captions, each sample's first with equal chance (reservoir sampling)."""
        texts, seen = self._report.texts, self._report.read
        if len(texts) < self._num_texts:
            texts.append(options[0])
        elif (place := int(self._random.integers(seen + 1))) < self._num_texts:
            texts[place] = options[0]

    def _read(self, member: Member) -> bytes:
        self._file.seek(member.offset)
        return self._file.read(member.size)


UTF8 = ("utf-8", "surrogateescape")


def is_image(suffix: str) -> bool:
    """Whether a member's suffix names an image, as the index sees it: by what follows its last dot."""
    return f".{suffix.rpartition('.')[2]}" in index.IMAGE_TYPES


def is_hostile(key: str) -> bool:
    """A name that would leave a folder it was unpacked into. Here keys are never paths."""
    return key.startswith("/") or ".." in key.split("/") or "\0" in key


def promised_count(shard: str) -> int | None:
    """How many samples files beside a shard say it holds: sizes.json (open_clip), NAME_stats.json (img2dataset)."""
    path = Path(shard)
    try:
        sizes = path.parent / "sizes.json"
        if sizes.exists():
            promised = read_json(sizes, dict).get(path.name)
        else:
            promised = read_json(path.with_name(f"{path.stem}_stats.json"), dict).get("successes")
    except UserError:
        return None
    return promised if type(promised) is int else None


def _keep_promises(reports: list[ShardReport]) -> None:
    """Counts as lost what a shard was promised to hold and does not."""
    for report in reports:
        promised = promised_count(report.path)
        found = report.samples + report.problems.get("swallowed", ("", 0))[1]
        if promised is None or promised <= found:
            continue
        missing = promised - found
        report.lost += missing
        report.expected += missing
        report.add("fewer than promised", f"{promised} promised, {found} found", missing)


def _find_duplicates(reports: list[ShardReport]) -> None:
    """Counts images that an earlier sample, of any shard, already has byte by byte."""
    hashes = np.concatenate([np.empty(0, "<u8"), *(report.measured["hash"] for report in reports)])
    starts = np.cumsum([0, *(len(report.measured) for report in reports)])
    order = np.argsort(hashes, kind="stable")
    repeated = order[1:][(np.diff(hashes[order]) == 0) & (hashes[order][1:] != 0)]
    repeated.sort()
    for number, report in enumerate(reports):
        mine = repeated[np.searchsorted(repeated, starts[number]) : np.searchsorted(repeated, starts[number + 1])]
        if len(mine):
            keys = zlib.decompress(report.keys).decode(*UTF8).split("\n")
            report.add("duplicate", keys[int(mine[0] - starts[number])], len(mine))


def token_lengths(texts: list[str]) -> Iterator[int]:
    """Tokens of each text, start and end included."""
    tokenizer = caption_sources.build_tokenizer()
    for text in texts:
        yield len(tokenizer.encode(text)) + 2
