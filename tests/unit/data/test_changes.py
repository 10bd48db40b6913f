"""The identity of data: what changed since it was indexed is named, by content; a touch is nothing."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amclip_ds import files
from amclip_ds.checkpoint import drift
from amclip_ds.errors import FAULT, AmclipError, RunStopped, UserError
from amclip_ds.shards import changes, contents, reader
from amclip_ds.shards.index import Index, build_index, default_folder, name_of
from amclip_ds.shards.stage import Stage
from tests.unit.data.faulty_server import FaultyServer
from tests.unit.data.shards import open_data, write_shards


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return write_shards(tmp_path / "data", (30, 30))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)


def edit(shard: str, key: str, keep_time: bool = False, member: str = "image") -> None:
    """Changes one byte in the middle of a member, in place."""
    index = build_index([shard], Path(shard).parent / "scratch", 1)
    number = next(n for n in range(len(index)) if index.key(n) == key)
    place = getattr(index.sample(number), member)
    stat = os.stat(shard)
    with open(shard, "r+b") as file:
        file.seek(place[0] + place[1] // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fail_at_stat(monkeypatch: pytest.MonkeyPatch, shard: str, number: int, times: int) -> None:
    """The file system does not say what is there, so many times."""
    monkeypatch.undo()
    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    stat, left = os.stat, [number] * times

    def failing(path: Any, *words: Any, **more: Any) -> os.stat_result:
        if path == shard and left:
            raise OSError(left.pop(), os.strerror(number), shard)
        return stat(path, *words, **more)

    monkeypatch.setattr(os, "stat", failing)


def touch(shard: str) -> None:
    os.utime(shard, ns=(1, time.time_ns()))


def changed(index: Index, paths: list[str]) -> list[tuple[str, str]]:
    """(path, what differs first) of each shard that has changed."""
    found = changes.changed_shards(index, paths, list(range(len(paths))), 1)
    assert all((one.what == "gone") == (not os.path.exists(one.path)) for one in found if "://" not in one.path)
    return [(one.path, one.detail) for one in found]


def epochs(data: object, steps: int) -> list[list[int]]:
    stream = data.batches(None)  # type: ignore[attr-defined]
    return [next(stream).sample_ids.tolist() for _ in range(steps)]


# Between indexing and a start


@pytest.mark.parametrize("member", ["image", "text", "json"])
def test_a_member_that_changed_is_named(member: str, shards: list[str], tmp_path: Path) -> None:
    index = build_index(shards, tmp_path / "index", 1)
    edit(shards[1], "1_0007", member=member)
    assert changed(index, shards) == [(shards[1], f"the {member} of 1_0007 is another")]


def test_a_touched_shard_is_what_it_was_and_is_checked_once(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(shards, tmp_path / "index", 1)
    before = index.fingerprint(), index.contents_fingerprint()
    for shard in shards:
        touch(shard)
    assert changed(index, shards) == []
    monkeypatch.setattr(changes, "scan_shard", lambda shard: 1 / 0)
    again = Index(tmp_path / "index")
    assert changed(again, shards) == [] and (again.fingerprint(), again.contents_fingerprint()) == before


def test_other_changes_are_named(shards: list[str], tmp_path: Path) -> None:
    more = write_shards(tmp_path / "more", (5, 6, 7))
    index = build_index(shards + more, tmp_path / "index", 1)
    write_shards(tmp_path / "data", (30, 29))
    with open(more[0], "ab") as file:
        file.write(bytes(512))
    os.unlink(more[1])
    Path(more[2]).write_bytes(b"1234")
    found = dict(changed(index, shards + more))
    assert found.pop(more[0]) == f"{os.path.getsize(more[0])} bytes now, {index.shards[2].size} when it was indexed"
    assert found == {
        shards[1]: "29 samples now, 30 when it was indexed",
        more[1]: "",
        more[2]: "0 samples now, 7 when it was indexed",
    }


def test_a_resume_refuses_what_changed_and_a_fresh_run_indexes_it_anew(shards: list[str], tmp_path: Path) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    with contextlib.closing(open_data(folder, index_dir=run)) as data:
        before = data.fingerprint, data.contents
    touch(shards[0])
    with contextlib.closing(open_data(folder, index_dir=run, resumes=True)) as data:
        assert (data.fingerprint, data.contents) == before, "a touch ends no run"
    edit(shards[0], "0_0003")
    for _ in range(2):
        with pytest.raises(UserError, match=r"0\.tar: changed since.*image of 0_0003 is another.*on_change=report"):
            open_data(folder, index_dir=run, resumes=True)
    said: list[str] = []
    with contextlib.closing(
        open_data(folder, index_dir=run, resumes=True, on_change="report", say=said.append)
    ) as data:
        assert data.samples_per_epoch == 60 and data.contents != before[1]
    assert any("the image of 0_0003 is another; the index is made again" in line for line in said)
    open_data(folder, index_dir=tmp_path / "other").close()


def test_a_stale_index_beside_the_shards_refuses_no_resume(shards: list[str], tmp_path: Path) -> None:
    """`amclip data index`, a shard replaced, and then the run: what it was trained on is in its own index."""
    folder, run, said = tmp_path / "data", tmp_path / "run", []
    build_index(shards, default_folder(tuple(shards)), 1)
    edit(shards[0], "0_0003")
    open_data(folder, index_dir=run, say=said.append).close()
    assert sum("is another; the index is made again" in line for line in said) == 1
    for resumes in (True, False):
        with contextlib.closing(open_data(folder, index_dir=run, resumes=resumes, say=said.append)) as data:
            assert data.index.folder.parent == run
    assert sum("the index is made again" in line for line in said) == 1, "of one that is not made, nothing is said"
    edit(shards[0], "0_0004")
    with pytest.raises(UserError, match=r"0\.tar: changed since.*image of 0_0004 is another.*on_change=report"):
        open_data(folder, index_dir=run, resumes=True)
    build_index(shards, default_folder(tuple(shards)), 1)
    with pytest.raises(UserError, match="image of 0_0004 is another"):  # one that fits now is not what was trained on
        open_data(folder, index_dir=run, resumes=True)


def test_an_index_is_found_however_its_folder_is_typed(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another spelling, a link, from another folder, after a move; and one that an earlier version named."""
    said: list[str] = []
    made = default_folder(tuple(shards))
    build_index(shards, made, 1)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for typed in (tmp_path / "data", "data", "./data/../data", "link", "data/*.tar"):
        open_data(typed, index_dir=tmp_path / "run", say=said.append).close()
    (tmp_path / "data").rename(tmp_path / "moved")
    open_data("moved", index_dir=tmp_path / "run", say=said.append).close()
    assert not [line for line in said if "indexed" in line], said
    moved = [path.replace("/data/", "/moved/") for path in shards]
    (tmp_path / "moved" / made.name).rename(tmp_path / "moved" / name_of(tuple(moved)))
    open_data(tmp_path / "moved", index_dir=tmp_path / "run", say=said.append).close()
    assert not [line for line in said if "indexed" in line], said
    open_data("moved", index_dir=tmp_path / "run", say=said.append).close()
    assert [line for line in said if "indexed" in line], "the twin: under the name that was typed alone"


def test_a_stale_index_that_is_the_only_one_refuses_a_resume(shards: list[str], tmp_path: Path) -> None:
    build_index(shards, default_folder(tuple(shards)), 1)
    edit(shards[0], "0_0003")
    with pytest.raises(UserError, match=r"0\.tar: changed since.*image of 0_0003 is another.*on_change=report"):
        open_data(tmp_path / "data", index_dir=tmp_path / "run", resumes=True)


@pytest.mark.parametrize("taken", ["keys.bin", "samples.bin", "meta.json"])
@pytest.mark.parametrize("given", [False, True])
def test_an_index_that_a_purge_took_a_file_of_is_made_again(
    given: bool, taken: str, shards: list[str], tmp_path: Path
) -> None:
    places = {"index": str(tmp_path / "index")} if given else {"index_dir": tmp_path / "run"}
    with contextlib.closing(open_data(tmp_path / "data", **places)) as data:
        before = data.fingerprint, data.contents
    (data.index.folder / taken).unlink()
    with contextlib.closing(open_data(tmp_path / "data", resumes=True, **places)) as data:
        assert (data.fingerprint, data.contents) == before


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ESHUTDOWN])
def test_a_shard_that_cannot_be_asked_after_just_now_is_not_gone(
    number: int, shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(shards, tmp_path / "index", 1)
    fail_at_stat(monkeypatch, shards[1], number, 2)
    assert changed(index, shards) == []
    fail_at_stat(monkeypatch, shards[1], number, 1000)
    with pytest.raises(AmclipError, match=r"1\.tar cannot be read: .*once the file system is well") as caught:
        changes.changed_shards(index, shards, [0, 1], 1)
    assert caught.value.exit_code == FAULT


def test_a_shard_that_may_not_be_read_is_not_gone(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(shards, tmp_path / "index", 1)
    fail_at_stat(monkeypatch, shards[1], errno.EACCES, 1)
    with pytest.raises(UserError, match=r"1\.tar: Permission denied"):
        changes.changed_shards(index, shards, [0, 1], 1)


def test_an_index_that_is_given_names_what_changed(shards: list[str], tmp_path: Path) -> None:
    build_index(shards, tmp_path / "index", 1)
    touch(shards[0])
    open_data(tmp_path / "data", index=str(tmp_path / "index")).close()
    edit(shards[0], "0_0003")
    with pytest.raises(
        UserError, match=r"data\.index: .*0\.tar: changed since.*the image of 0_0003 is another.*make it again: amclip"
    ):
        open_data(tmp_path / "data", index=str(tmp_path / "index"))


def test_a_checkpoint_knows_the_content_it_was_trained_on() -> None:
    def compared(before: dict[str, str], now: dict[str, str]) -> list[drift.Change]:
        return drift.changes_between("a: 1", "a: 1", before, now, "float32", "float32")

    [refused] = compared({"contents": "a"}, {"contents": "b"})
    assert refused.key == "data.train" and not refused.is_free
    assert not compared({}, {"contents": "b"}), "a checkpoint from before contents were noted"


def test_an_index_without_contents_still_serves(shards: list[str], tmp_path: Path) -> None:
    """One made by an earlier version: changes are seen by size and time alone."""
    index = build_index(shards, tmp_path / "index", 1)
    (tmp_path / "index" / "content.bin").unlink()
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    for entry in meta["shards"]:
        del entry["contents"], entry["etag"]
    (tmp_path / "index" / "meta.json").write_text(json.dumps(meta))
    old = Index(tmp_path / "index")
    assert old.fingerprint() == index.fingerprint() and old.contents_fingerprint() == ""
    with contextlib.closing(open_data(tmp_path / "data", index=str(tmp_path / "index"))) as data:
        assert epochs(data, 2)
    touch(shards[0])
    assert changed(old, shards) == [(shards[0], "")]


# While it trains


@pytest.mark.parametrize("workers", [0, 1])
def test_a_change_that_size_and_time_hide_stops_the_run(workers: int, shards: list[str], tmp_path: Path) -> None:
    build_index(shards, tmp_path / "index", 1)
    edit(shards[1], "1_0011", keep_time=True)
    with (
        contextlib.closing(open_data(tmp_path / "data", index=str(tmp_path / "index"), workers=workers)) as data,
        pytest.raises(RunStopped, match=r"1\.tar: the image of 1_0011 is not what was indexed.*data\.on_change=report"),
    ):
        epochs(data, data.steps_per_epoch)


def test_a_change_is_reported_where_that_is_allowed(shards: list[str], tmp_path: Path) -> None:
    build_index(shards, tmp_path / "index", 1)
    edit(shards[1], "1_0011", keep_time=True, member="text")
    with contextlib.closing(open_data(tmp_path / "data", index=str(tmp_path / "index"), on_change="report")) as data:
        stream = data.batches(None)
        batches = [next(stream) for _ in range(data.steps_per_epoch)]
    incidents = [row for batch in batches for row in batch.incidents]
    assert [(row["kind"], row["key"], row["action"]) for row in incidents] == [
        ("changed", "1_0011", "trained on all the same")
    ]
    assert sorted(n for batch in batches for n in batch.sample_ids.tolist()) == list(range(60))


def test_a_shard_cut_while_it_is_read_is_a_change(shards: list[str], tmp_path: Path) -> None:
    with contextlib.closing(open_data(tmp_path / "data")) as data:
        stream = data.batches(None)
        next(stream)
        os.truncate(shards[0], 4)
        with pytest.raises(RunStopped, match=r"0\.tar: has 4 bytes now, \d+ when it was indexed"):
            for _ in range(data.steps_per_epoch):
                next(stream)


def test_one_bad_reading_is_repeated(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(shards, tmp_path / "index", 1)
    pread, left = os.pread, [1]

    def once_wrong(file: int, size: int, at: int) -> bytes:
        content = pread(file, size, at)
        if left and size > 600:
            left.pop()
            return content[:100] + bytes([content[100] ^ 8]) + content[101:]
        return content

    monkeypatch.setattr(os, "pread", once_wrong)
    with contextlib.closing(open_data(tmp_path / "data", index=str(tmp_path / "index"))) as data:
        stream = data.batches(None)
        incidents = [row for _ in range(data.steps_per_epoch) for row in next(stream).incidents]
    assert not left and [row["kind"] for row in incidents] == ["retried"]
    assert "came wrong, and right at a second reading" in incidents[0]["cause"]


def test_a_poisoned_copy_is_dropped_and_the_shard_serves(shards: list[str], tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    copy = stage.folder / stage.name_of(shards[0])
    copy.write_bytes(bytes(os.path.getsize(shards[0])))
    stages = {"stage_dir": str(tmp_path / "stage"), "index_dir": tmp_path / "run"}
    with contextlib.closing(open_data(tmp_path / "data", **stages)) as data:
        seen = sorted(n for ids in epochs(data, data.steps_per_epoch) for n in ids)
    assert seen == list(range(60))
    assert not copy.exists() or copy.read_bytes() == Path(shards[0]).read_bytes()


# Remote


@pytest.fixture
def server(shards: list[str]) -> Iterator[FaultyServer]:
    with FaultyServer({Path(path).name: Path(path).read_bytes() for path in shards}) as server:
        yield server


def test_a_remote_shard_replaced_before_a_start_is_named(
    server: FaultyServer, shards: list[str], tmp_path: Path
) -> None:
    urls = [f"{server.url}/{n}.tar" for n in (0, 1)]
    index = build_index(urls, tmp_path / "index", 1)
    assert all(shard.etag for shard in index.shards) and changed(index, urls) == []
    edit(shards[1], "1_0007")
    server.files["1.tar"] = Path(shards[1]).read_bytes()
    server.files["0.tar"] = b"1234"
    assert changed(index, urls) == [
        (urls[0], "0 samples now, 30 when it was indexed"),
        (urls[1], "the image of 1_0007 is another"),
    ]


def test_a_new_etag_of_the_same_content_is_nothing(server: FaultyServer, tmp_path: Path) -> None:
    index = build_index([f"{server.url}/0.tar"], tmp_path / "index", 1)
    index.shards[0].etag = "another"
    assert changed(index, [f"{server.url}/0.tar"]) == [] and index.shards[0].etag != "another"


@pytest.mark.parametrize("other, said", [("same size", "is not what was indexed"), ("4 bytes", "has 4 bytes now")])
def test_a_remote_shard_replaced_while_it_trains_stops_the_run(
    other: str, said: str, server: FaultyServer, shards: list[str], tmp_path: Path
) -> None:
    build_index([f"{server.url}/{n}.tar" for n in (0, 1)], tmp_path / "index", 1)
    with contextlib.closing(open_data(f"{server.url}/{{0..1}}.tar", index=str(tmp_path / "index"))) as data:
        stream = data.batches(None)
        next(stream)
        edit(shards[1], "1_0007")
        server.files["1.tar"] = Path(shards[1]).read_bytes() if other == "same size" else b"1234"
        with pytest.raises(RunStopped, match=rf"1\.tar: .*{said}"):
            for _ in range(data.steps_per_epoch):
                next(stream)


def test_checksums_find_the_first_difference() -> None:
    before = np.zeros(5, contents.CONTENT)
    now = before.copy()
    assert contents.first_difference(before, now) == (-1, "")
    now[3]["json"], now[4]["image"] = 1, 1
    assert contents.first_difference(before, now) == (3, "json")
