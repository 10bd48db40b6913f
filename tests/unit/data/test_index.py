"""The index: what it says of each sample, its size on disk, half a million samples, staleness."""

import errno
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from amclip_ds import files
from amclip_ds.cli import main
from amclip_ds.data import prepare
from amclip_ds.data.config import DataConfig
from amclip_ds.data.order import EpochOrder, Mixture
from amclip_ds.data.prepare import find_sources
from amclip_ds.data.train_sources import check_inputs
from amclip_ds.errors import FAULT, AmclipError, UserError
from amclip_ds.shards import index as indexing
from amclip_ds.shards import reader as reading
from amclip_ds.shards.index import (
    BAD_HEADER,
    HAS_JSON,
    HAS_TEXT,
    MAX_META,
    RECORD,
    VERSION,
    Index,
    ShardEntry,
    _meta_of,
    build_index,
    default_folder,
)
from amclip_ds.shards.reader import ShardReader
from amclip_ds.shards.sources import MAX_SHARDS
from tests.unit.data.shards import jpeg, open_data, write_shards, write_tar


def test_every_member_is_where_the_index_says(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, (5, 1, 7), width=40, height=30)
    index = build_index(paths, tmp_path / "index", workers=1)
    assert len(index) == 13 and index.counts.tolist() == [5, 1, 7]
    reader = ShardReader()
    for number in range(13):
        sample = index.sample(number)
        shard, within = sample.key.split("_")
        assert sample.shard == paths[int(shard)] and sample.sample_id == number
        assert sample.text and sample.json
        image, text, fields = reader.read_many(sample.shard, [sample.image, sample.text, sample.json])
        assert image == jpeg(1000 * int(shard) + int(within), width=40, height=30)
        assert text.decode() == f"picture {int(within)} of shard {shard}"
        assert json.loads(fields)["title"] == f"t{int(within)}"
        record = index.records[number]
        assert (record["width"], record["height"], record["format"]) == (40, 30, 1)
        assert record["flags"] == HAS_TEXT | HAS_JSON
    first, last = int(index.starts[2]), int(index.starts[3]) - 1
    start, stop = index.bytes_of(first, last)
    assert start == index.sample(first).image[0] and stop == sum(index.sample(last).json or (0, 0))


def test_in_processes_it_is_the_same(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, (5, 1, 7))
    build_index(paths, tmp_path / "one", workers=1)
    build_index(paths, tmp_path / "two", workers=2)
    for name in ("meta.json", "samples.bin", "keys.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_missing_is_reported(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "1.jpg": jpeg(),
            "1.txt": b"one",
            "2.jpg": jpeg(),
            "3.txt": b"no image",
            "4.png": b"no header",
            "4.json": b"{}",
        },
    )
    index = build_index([str(shard)], tmp_path / "index", workers=1)
    assert [index.key(number) for number in range(3)] == ["1", "2", "4"]
    assert index.records["flags"].tolist() == [HAS_TEXT, 0, HAS_JSON | BAD_HEADER]
    assert {(p["kind"], p["key"]) for p in index.shards[0].problems} == {("no caption", "2"), ("no image", "3")}


def test_a_header_behind_a_long_profile_is_read(tmp_path: Path) -> None:
    """Printers' colour profiles fill hundreds of kilobytes before the size is reported."""
    content = jpeg(width=33, height=22)
    padding = b"".join(b"\xff\xe2" + (60_002).to_bytes(2, "big") + bytes(60_000) for _ in range(5))
    shard = write_tar(tmp_path / "a.tar", {"1.jpg": content[:2] + padding + content[2:], "1.txt": b"one"})
    index = build_index([str(shard)], tmp_path / "index", workers=1)
    assert (index.records[0]["width"], index.records[0]["height"]) == (33, 22)


def test_it_is_compact() -> None:
    assert RECORD.itemsize < 40


def write_synthetic_index(folder: Path, num_shards: int, per_shard: int) -> None:
    """An index of num_shards x per_shard samples that are nowhere."""
    folder.mkdir()
    keys = "".join(f"{number:09d}" for number in range(per_shard)).encode()
    records = np.zeros(per_shard, RECORD)
    records["image_block"] = np.arange(per_shard) * 120
    records["image_size"], records["text_size"], records["flags"] = 50_000, 60, HAS_TEXT
    records["key_offset"] = 9 * np.arange(per_shard)
    (folder / "samples.bin").write_bytes(records.tobytes() * num_shards)
    (folder / "keys.bin").write_bytes(keys * num_shards)
    entries = [
        vars(ShardEntry(f"/data/{number:05d}.tar", 1 << 30, 0, f"{number:016x}", per_shard, [], len(keys)))
        for number in range(num_shards)
    ]
    meta = {"version": VERSION, "samples": num_shards * per_shard, "shards": entries}
    (folder / "meta.json").write_text(json.dumps(meta))


def test_half_a_million_samples_open_and_seek_quickly_in_little_memory(tmp_path: Path) -> None:
    """The targets (1 s, 200 MB, 100 ms) with room for a busy machine; benchmarks/index.py has the figures."""
    write_synthetic_index(tmp_path / "index", 100, 5000)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    index = Index(tmp_path / "index")
    opened = time.perf_counter() - began
    mixture = Mixture(np.zeros(100, int), (1.0,))
    seeks = []
    for position in (0, 123_456, 499_000):
        began = time.perf_counter()
        order = EpochOrder(index.counts, mixture, 0, 7, 16, 8192)
        rows = order.locate(position, position + 512)
        samples = [index.sample(int(index.starts[shard]) + int(within)) for shard, within, _ in rows]
        seeks.append(time.perf_counter() - began)
        assert len(samples) == 512 and samples[0].key == f"{int(rows[0, 1]):09d}"
    assert opened < 5 and max(seeks) < 2, (opened, seeks)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    on_disk = sum((tmp_path / "index" / name).stat().st_size for name in ("samples.bin", "meta.json"))
    assert on_disk < 40 * len(index)


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    prints = []
    for name, sizes in (("a", (3, 3)), ("b", (3, 3)), ("c", (3, 4))):
        index = build_index(write_shards(tmp_path / name, sizes), tmp_path / f"{name}-index", workers=1)
        prints.append(index.fingerprint())
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / "meta.json").unlink(), "holds no index"),
        (lambda folder: (folder / "meta.json").write_text("{"), "holds no index"),
        (lambda folder: (folder / "meta.json").write_text('{"version": 0}'), "has format 0"),
        (lambda folder: (folder / "samples.bin").write_bytes(bytes(RECORD.itemsize)), "is cut short"),
    ],
)
def test_a_damaged_index_is_refused(damage, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    build_index(write_shards(tmp_path, (3,)), tmp_path / "index", workers=1)
    damage(tmp_path / "index")
    with pytest.raises(UserError, match=f"data.index: .*{said}.*amclip data index|data.index: .*{said}"):
        Index(tmp_path / "index")


@pytest.mark.parametrize(
    "problem",
    [
        {"count": 1},
        {"kind": "no image", "count": 1},
        {"kind": "no image", "key": 5, "count": 1},
        {"kind": ["no image"], "key": "k", "count": 1},
        {"kind": "no image", "key": "k", "count": "1"},
    ],
)
def test_a_problem_of_other_types_is_refused(problem: dict, tmp_path: Path) -> None:
    build_index(write_shards(tmp_path, (3,)), tmp_path / "index", workers=1)
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    meta["shards"][0]["problems"] = [{"kind": "no image", "key": "k", "count": 1}]
    (tmp_path / "index" / "meta.json").write_text(json.dumps(meta))
    assert Index(tmp_path / "index").shards[0].problems
    meta["shards"][0]["problems"] = [problem]
    (tmp_path / "index" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="no list of shards .a problem without kind, key and count.; make it again"):
        Index(tmp_path / "index")


def test_as_many_shards_as_there_may_be_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 263 bytes a shard, MAX_SHARDS take 276 MB; what could not be read is refused before a shard is opened."""
    entry = ShardEntry("/lustre/laion/" + "x" * 40, 1 << 30, 1 << 60, "0" * 16, 10_000, [], 1 << 20, "0" * 32)
    assert len(_meta_of([entry])) * MAX_SHARDS < MAX_META
    opened: list[str] = []
    monkeypatch.setattr(indexing, "_scanned", lambda shards, workers: opened.extend(shards) or iter(()))
    monkeypatch.setattr(indexing, "MAX_META", 10_000)
    with pytest.raises(UserError, match=r"data\.index: 10 shards of such long paths .* 10000 bytes .*shorter paths"):
        build_index(["x" * 1000] * 10, tmp_path / "index", 1)
    assert not opened and not list(tmp_path.iterdir())


def test_an_index_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_shards(tmp_path / "data", (3, 3))

    def stop(entry: ShardEntry) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(paths, tmp_path / "index", 1, stop)
    assert not list(tmp_path.glob("*index*")) and not list(tmp_path.glob(".*index*"))
    build_index(paths, tmp_path / "index", 1)
    build_index(paths[:1], tmp_path / "index", 1)  # in the old one's place
    assert len(Index(tmp_path / "index")) == 3 and default_folder(tuple(paths)).parent == tmp_path / "data"


def fail_at_opening(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The file system of 1.tar answers ESTALE so many times."""
    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    failures, opened = [errno.ESTALE] * times, reading.open_shard

    @contextmanager
    def failing(shard: str) -> Iterator[reading.Opened]:
        if shard.endswith("1.tar") and failures:
            raise OSError(failures.pop(), "Stale file handle", shard)
        with opened(shard) as file:
            yield file

    monkeypatch.setattr(reading, "open_shard", failing)


def test_a_stale_file_handle_is_no_property_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "data", (10, 10))
    fail_at_opening(monkeypatch, 2)
    open_data(tmp_path / "data", index_dir=tmp_path / "run").close()
    assert "1.tar cannot be read: Stale file handle; tried again for" in capfd.readouterr().err


def test_one_that_stays_ends_with_the_machines_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "data", (10, 10))
    fail_at_opening(monkeypatch, 100)
    with pytest.raises(AmclipError, match=r"1\.tar cannot be read: Stale file handle; once the file system") as caught:
        open_data(tmp_path / "data", index_dir=tmp_path / "run")
    assert caught.value.exit_code == FAULT


@pytest.mark.parametrize("hangs", [False, True])
def test_an_index_that_gets_on_gives_signs_of_life(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: one that hangs at its first shard gives none, so that the watchdog sees it."""
    write_shards(tmp_path / "data", (3,) * 5)
    monkeypatch.setattr(prepare, "BUILD_REPORTS_EVERY_S", 0.1)
    scan, signs = indexing.scan_shard, []

    def slow(shard: str) -> indexing.Scanned:
        time.sleep(1.0 if hangs and shard.endswith("0.tar") else 0.0 if hangs else 0.2)
        return scan(shard)

    monkeypatch.setattr(indexing, "scan_shard", slow)
    began = time.monotonic()
    data = open_data(
        tmp_path / "data", index_dir=tmp_path / "run", on_progress=lambda: signs.append(time.monotonic() - began)
    )
    data.close()
    assert min(signs, default=1.0) >= 1.0 if hangs else len(signs) >= 3, signs


def test_what_processes_that_are_gone_left_is_removed(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, (2,))
    here, old, other = os.uname().nodename, tmp_path / ".index.elsewhere.7.partial", ".index.elsewhere.8.partial"
    for name in (
        f".index.{here}.{1 << 30}.partial",
        f".index.{here}.{os.getpid()}.partial",
        f".index.{here}.1.partial",
    ):
        (tmp_path / name).mkdir()
    for path in (old, tmp_path / other, tmp_path / ".index2.elsewhere.7.partial"):
        path.mkdir()
        (path / "samples.bin").touch()
    for path in (old, old / "samples.bin"):
        os.utime(path, (1, 1))
    build_index(paths, tmp_path / "index", 1)
    left = {path.name for path in tmp_path.glob(".*")}
    assert left == {f".index.{here}.1.partial", other, ".index2.elsewhere.7.partial"}


OTHERS = {
    "shards": lambda folder: write_shards(folder, (3,)),
    "index and more": lambda folder: (
        [build_index(write_shards(folder.parent / "data", (3,)), folder, 1)]
        and (folder / "notes.txt").write_text("mine")
    ),
    "empty file": lambda folder: folder.touch(),
    "lost link": lambda folder: folder.symlink_to("nowhere"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_but_an_index_is_replaced(other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, folder = write_shards(tmp_path / "shards", (3,)), tmp_path / "other"
    OTHERS[other](folder)
    before = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else os.lstat(folder).st_mode
    assert main(["data", "index", *shards, "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"amclip data: --out: {folder} ") and len(error.splitlines()) == 1
    config = DataConfig(train=shards[0], index=str(folder))
    if other != "index and more":  # training reads that one, and never replaces one that is there
        with pytest.raises(UserError, match=f"data.index: {folder} "):
            check_inputs(config, None)
        with pytest.raises(UserError, match=f"data.index: {folder} "):
            find_sources(config, print, lambda work: work())
    assert before == (sorted(path.name for path in folder.iterdir()) if folder.is_dir() else os.lstat(folder).st_mode)
    assert not list(tmp_path.glob(".*"))


def test_an_index_an_empty_folder_and_a_link_to_one_are_replaced(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", (3,))
    (tmp_path / "index").mkdir()
    build_index(shards, tmp_path / "index", 1)
    (tmp_path / "index" / ".meta.json.1.partial").touch()  # of a process that was killed
    assert len(build_index(shards * 2, tmp_path / "index", 1)) == 6
    (tmp_path / "link").symlink_to("index")
    assert len(build_index(shards, tmp_path / "link", 1)) == 3
    assert len(Index(tmp_path / "index")) == 6 and not (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))


def test_what_comes_while_an_index_is_made_stays(tmp_path: Path) -> None:
    shards, folder = write_shards(tmp_path / "shards", (3,)), tmp_path / "index"
    build_index(shards, folder, 1)
    build_index(shards, folder, 1, lambda entry: (folder / "mine.tar").touch())
    assert [path.name for path in tmp_path.glob(".index.*.old/*")] == ["mine.tar"]
