"""Checks every sample of a set of shards before a run, and accounts for each: read, skipped or lost.

expected = read + skipped + lost, always. Expected is what a `sizes.json` or img2dataset's `NAME_stats.json` beside the
shards promises, else what the tar itself shows: samples begun, images that no sample has, and samples that damage has
visibly swallowed.
"""

import contextlib
import functools
import hashlib
import os
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
from amclip_ds.data.config import DataConfig, check_sources
from amclip_ds.data.plain_text import BadText
from amclip_ds.errors import UserError
from amclip_ds.files import read_json
from amclip_ds.images import ARE_READ, BadImage, open_image
from amclip_ds.keyed_random import keyed
from amclip_ds.processes import WorkerCrashed, map_in_processes
from amclip_ds.redact import redact_all
from amclip_ds.shards import index, reader
from amclip_ds.shards.grouping import IMAGE_TYPES, Group, group, left_out_name, scattered
from amclip_ds.shards.kinds import IMAGES
from amclip_ds.shards.tar import BLOCK, Damage, Member, scan

TRAINING = DataConfig()  # what training would do unless set otherwise
# What a sample can be skipped for, in the order checked; what makes it lost; what is only good to know.
SKIPPED = (
    "surplus image",
    "no image",
    "too large",
    "sparse",
    "broken image",
    "not adjacent",
    "no caption",
    "empty caption",
    "not utf-8",
    "bad json",
)
LOST = ("unreadable", "empty", "truncated", "header", "name", "swallowed", "fewer than promised", "crash")
SMALL_SIDE = 32
DECODED_SIDE = 224  # a large JPEG is decoded at the reduced scale that leaves at least this
EXTREME_ASPECT = 5.0
CAPTIONS_TO_TOKENISE = 4000  # of the whole set: enough for percentiles
MEASURED = np.dtype(
    [
        ("hash", "<u8"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("image_bytes", "<u4"),
        ("format", "u1"),
        ("captions", "<u2"),
        ("characters", "<u4"),
    ]
)


@dataclass(frozen=True)
class CheckConfig:
    """What is checked."""

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
    count_words: bool = False
    """Count the words of all captions."""

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
    """in the tar, whether checked or not; each surplus image counts as one"""
    images: int = 0
    """in the tar, whether checked or not: those of samples, and the surplus"""
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
    words: Counter[str] = field(default_factory=Counter)
    """how often each word is in all captions, where asked for"""

    def add(self, kind: str, key: str, count: int = 1) -> None:
        """Counts a problem."""
        first, before = self.problems.get(kind, (key, 0))
        self.problems[kind] = (first, before + count)

    def is_ok(self, max_skip_rate: float) -> bool:
        """Whether it can be trained on: nothing lost, and few enough samples skipped or doubled."""
        bad = self.skipped + self.problems.get("duplicate", ("", 0))[1]
        return not any(kind in self.problems for kind in LOST) and bad <= max_skip_rate * self.expected

    def surplus(self) -> int:
        """Images in the tar that no sample has."""
        return self.problems.get("surplus image", ("", 0))[1]


@dataclass
class CheckReport:
    """What a check found in all shards."""

    config: CheckConfig
    shards: list[ShardReport]

    def total(self, name: str) -> int:
        """Sum over the shards of expected, read, skipped, lost, samples, images or num_bytes."""
        return sum(getattr(shard, name) for shard in self.shards)

    @property
    def ok(self) -> bool:
        """Whether to submit."""
        rate = self.config.max_skip_rate
        bad = self.total("skipped") + self.problems()["duplicate"]
        surplus = sum(shard.surplus() for shard in self.shards)  # of all headers, where only a part is checked
        is_lost = self.total("lost") > 0 or any(kind in shard.problems for shard in self.shards for kind in LOST)
        return (
            self.total("read") > 0
            and not is_lost
            and bad <= rate * self.total("expected")
            and surplus <= rate * self.total("images")
        )

    def problems(self) -> Counter[str]:
        """Counts by kind."""
        totals: Counter[str] = Counter()
        for shard in self.shards:
            totals.update({kind: count for kind, (_, count) in shard.problems.items()})
        return totals

    def causes(self) -> Counter[str]:
        """Why images could not be read, with counts."""
        return sum((shard.causes for shard in self.shards), Counter())

    def worst(self) -> list[tuple[str, int, str, str]]:
        """(kind, how many, the first one's key, its shard), the most frequent first."""
        first: dict[str, tuple[str, str]] = {}
        for shard in self.shards:
            for kind, (key, _) in shard.problems.items():
                first.setdefault(kind, (key, shard.path))
        return [(kind, count, *first[kind]) for kind, count in self.problems().most_common()]

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

    def account(self) -> str:
        """What became of the images in the tars, in one line."""
        surplus = sum(shard.surplus() for shard in self.shards)
        unusable = self.total("images") - self.total("read") - surplus
        others = "unusable" if self.config.sample == 1 else "unusable or not checked"
        return f"{self.total('images')} images = {self.total('read')} read + {surplus} surplus + {unusable} {others}"

    def as_json(self) -> dict[str, Any]:
        """The record that scripts read (`data check --json`)."""
        shards = [
            {
                "path": shard.path,
                "ok": shard.is_ok(self.config.max_skip_rate),
                "samples": shard.samples,
                "problems": [{"kind": k, "key": key, "count": n} for k, (key, n) in shard.problems.items()],
                "expected": shard.expected,
                "read": shard.read,
                "skipped": shard.skipped,
                "lost": shard.lost,
                "causes": dict(shard.causes),
            }
            for shard in self.shards
        ]
        names = ("expected", "read", "skipped", "lost", "samples", "images", "num_bytes")
        totals = {name: self.total(name) for name in names}
        more = {"ok": self.ok, "samples_per_core_second": self.samples_per_core_second(), "config": asdict(self.config)}
        return redact_all({"shards": shards} | totals | more)


def check(
    shards: list[str],
    config: CheckConfig,
    processes: int,
    on_shard: Callable[[ShardReport], None] = lambda report: None,
) -> CheckReport:
    """Checks the shards in parallel. Whatever they hold, it returns: damage is reported, never raised."""
    texts = -(-CAPTIONS_TO_TOKENISE // len(shards))
    reports = []
    checked = map_in_processes(functools.partial(check_shard, config, texts), shards, processes)
    for shard, found in zip(shards, checked, strict=True):
        if isinstance(found, WorkerCrashed):
            report = ShardReport(shard)
            report.add("crash", str(found))
        else:
            report = found
        reports.append(report)
        on_shard(report)
    _keep_promises(reports)
    _find_duplicates(reports)
    return CheckReport(config, reports)


def check_shard(config: CheckConfig, num_texts: int, shard: str) -> ShardReport:
    """Checks one shard."""
    report, began = ShardReport(shard), time.perf_counter()
    try:
        with reader.open_shard(shard) as (file, size, *_):
            report.num_bytes = size
            _Pass(config, num_texts, report, file).run(size)
    except OSError as error:
        report.add("unreadable", error.strerror or str(error))
    report.expected = report.read + report.skipped + report.lost
    report.seconds = time.perf_counter() - began
    return report


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
        if not groups and not any(kind in report.problems for kind in LOST):
            report.add("empty", "no members")
        for key, count in Counter(one.key for one in groups).items():
            if count > 1:
                report.add("duplicate key", key, count - 1)
        for one in groups:
            surplus = [image for _, image in one.images()[1:]]
            report.samples += 1 + len(surplus)
            report.images += bool(one.of_types(*IMAGES)) + len(surplus)
            if surplus:
                report.add("surplus image", surplus[0].name, len(surplus))
            elif texts := one.of_types("txt")[1:]:  # beside surplus images each text is another image's
                report.add("surplus caption", texts[0][1].name, len(texts))
            if one.at_damage or self._config.sample >= 1 or self._random.random() < self._config.sample:
                report.skipped += len(surplus)
                self._check_sample(one)
        report.measured = np.array(self._rows, dtype=MEASURED)
        report.keys = zlib.compress("\n".join(key.replace("\n", " ") for key in self._keys).encode(*UTF8))

    def _groups(self, size: int) -> list[Group]:
        """The samples of the tar, without those groups whose image is elsewhere in it; counts as lost what damage has
        swallowed whole."""
        groups: list[Group] = []
        damages: list[tuple[int, Damage]] = []
        for item in group(scan(self._file, size)):
            if isinstance(item, Group):
                groups.append(item)
            elif isinstance(item, Damage):
                self._report.add(item.kind, str(item))
                damages.append((len(groups), item))
            elif kind := left_out_name(item):
                self._report.add(kind, item.name)
        self._count_swallowed(groups, damages)
        self._scattered = scattered(groups)
        if self._scattered:
            self._report.add("not adjacent", min(self._scattered), len(self._scattered))
        return [one for one in groups if one.key not in self._scattered or one.images()]

    def _count_swallowed(self, groups: list[Group], damages: list[tuple[int, Damage]]) -> None:
        """Counts as lost the samples of which damage has left nothing: by its size, and at least one, unless a sample
        beside it lacks a member, which explains it."""
        if not groups:
            return
        usual = Counter(tuple(sorted(one.members)) for one in groups).most_common(1)[0][0]
        sizes = [sum(BLOCK + -(-m.size // BLOCK) * BLOCK for m in one.members.values()) for one in groups]
        for place, damage in damages:
            around = groups[max(0, place - 1) : place + 1]
            incomplete = sum(bool(set(usual) - set(one.members)) for one in around)
            swallowed = round(damage.num_bytes / statistics.median(sizes)) - incomplete
            if damage.kind in ("header", "truncated") and not incomplete:
                swallowed = max(swallowed, 1)
            elif damage.kind == "zeros" and not incomplete:
                swallowed = 0  # joined tars; what a hole between whole samples held, nothing here can say
            if swallowed > 0:
                self._report.lost += swallowed
                self._report.add("swallowed", f"by damage at byte {damage.offset}", swallowed)

    def _check_sample(self, one: Group) -> None:
        report = self._report
        problem, row = self._problem_of(one)
        if problem == "no image" and one.at_damage:
            report.lost += 1
            report.add("swallowed", one.key)
        elif problem == "no caption" and one.key in self._scattered:
            report.skipped += 1  # reported already: its caption is not adjacent
        elif problem:
            report.skipped += 1
            report.add(problem, one.key)
        else:
            report.read += 1
            self._rows.append(row)
            self._keys.append(one.key)
        if is_hostile(one.key):
            report.add("hostile name", one.key)

    def _problem_of(self, one: Group) -> tuple[str, tuple]:
        """Why a sample would be skipped ("" if it would not), and its row of measurements."""
        images = one.images()
        if not images:
            for kind, _ in one.of_types(*IMAGES)[:1]:
                self._report.causes[f"has a .{kind}; {ARE_READ}"] += 1
            return "no image", ()
        kind, image = images[0]
        if why := one.unreadable():
            return why, ()
        try:
            height, width, digest = self._image(one.key, image)
            options = self._captions(one)
        except BadImage as error:
            if error.kind == "too large":
                return "too large", ()
            self._report.causes[str(error)] += 1
            return "broken image", ()
        except BadText as error:
            self._report.causes[str(error)] += 1
            return error.kind, ()
        if min(width, height) < SMALL_SIDE:
            self._report.add("too small", one.key)
        if max(width, height) > EXTREME_ASPECT * min(width, height):
            self._report.add("aspect", one.key)
        self._keep_text(options)
        if self._config.count_words:
            for option in options:
                self._report.words.update(caption_sources.build_tokenizer().split(option))
        row = (digest, width, height, image.size, IMAGE_TYPES[kind], min(len(options), 65535), len(options[0]))
        return "", row

    def _image(self, key: str, image: Member) -> tuple[int, int, int]:
        """(height, width, hash), decoded as training does if asked. Raises BadImage."""
        if not self._config.decode:
            width, height = index.image_size(self._file, image)
            if width * height > self._config.max_pixels or width == 0:
                raise BadImage("too large" if width else "unreadable", "a header that cannot be read")
            return height, width, 0
        content = self._read(image)
        source = open_image(content, self._config.max_pixels)
        if source.decode(min(source.height, source.width) / DECODED_SIDE).damaged:
            self._report.add("damaged image", key)
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return source.height, source.width, int.from_bytes(digest, "little")

    def _captions(self, one: Group) -> list[str]:
        """The captions a sample offers. Raises BadText."""
        read = caption_sources.members_read(self._config.captions)
        members = [one.member(kind) if is_read else None for kind, is_read in zip(("txt", "json"), read)]
        text, fields = (self._read(member) if member else None for member in members)
        return caption_sources.candidates(text, fields, self._config.captions, self._config.caption_per_line)

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


STATS = "_stats.json"  # img2dataset's, beside NAME.tar
UTF8 = ("utf-8", "surrogateescape")


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
            promised = read_json(path.with_name(path.stem + STATS), dict).get("successes")
    except UserError:
        return None
    return promised if type(promised) is int else None


def _gone(shards: list[str]) -> Iterator[tuple[str, int]]:
    """(a shard that files beside those checked promise and that is not there, how many samples it held), of folders
    all of whose tars were checked: of others a part was asked for."""
    by_folder: dict[Path, set[str]] = {}
    for shard in shards:
        by_folder.setdefault(Path(shard).parent, set()).add(Path(shard).name)
    for folder, checked in by_folder.items():
        try:
            names = set(os.listdir(folder))
        except OSError:  # a remote one's
            continue
        if {name for name in names if name.endswith(".tar") and not name.startswith(".")} - checked:
            continue
        listed = {name.removesuffix(STATS) + ".tar" for name in names if name.endswith(STATS)}
        if "sizes.json" in names:
            with contextlib.suppress(UserError):
                listed = {str(name) for name in read_json(folder / "sizes.json", dict)}
        for name in sorted(listed - names):
            if "/" not in name and (promised := promised_count(str(folder / name))):
                yield str(folder / name), promised


def _keep_promises(reports: list[ShardReport]) -> None:
    """Counts as lost what a shard was promised to hold and does not; a shard that is gone has lost all of it."""
    for report in reports:
        promised = promised_count(report.path)
        found = report.samples + report.problems.get("swallowed", ("", 0))[1]
        if promised is None or promised <= found:
            continue
        missing = promised - found
        report.lost += missing
        report.expected += missing
        report.add("fewer than promised", f"{promised} promised, {found} found", missing)
    for shard, held in _gone([report.path for report in reports]):
        report = ShardReport(shard, expected=held, lost=held)
        report.add("fewer than promised", f"{held} promised, and no such file", held)
        reports.append(report)


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
