"""Reading by offset: neighbours in one go, bad moments of a file system, copies on a local disk within a budget."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.data import reader
from amclip_ds.data.reader import GAP, ShardReader, Stage, retry
from amclip_ds.errors import UserError


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(range(256)) * 4096)
    return str(path)


def test_contents_come_as_asked_and_neighbours_in_one_read(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: reads.append((at, size)) or pread(file, size, at))
    places = [(700_000, 3), (10, 4), (20, 2), (10, 4)]
    content = Path(shard).read_bytes()
    assert ShardReader().read_many(shard, places) == [content[at : at + size] for at, size in places]
    assert reads == [(10, 12), (700_000, 3)] and GAP < 700_000 - 22


def test_what_cannot_be_read_is_an_error_of_its_place_alone(shard: str, tmp_path: Path) -> None:
    missing, beyond = str(tmp_path / "missing.tar"), (shard, 2**20 - 2, 10)
    contents = ShardReader().read([(shard, 0, 2), (missing, 0, 2), beyond])
    assert contents[(shard, 0, 2)] == b"\x00\x01"
    assert isinstance(contents[(missing, 0, 2)], FileNotFoundError)
    assert "2 of 10 bytes came" in str(contents[beyond])
    with pytest.raises(OSError, match="2 of 10 bytes"):
        ShardReader().read_many(shard, [beyond[1:]])


def test_a_bad_moment_of_a_network_file_system_is_repeated_and_told(
    shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    told: list[str] = []
    pread, failures = os.pread, [errno.ESTALE, errno.EIO]

    def sometimes(file: int, size: int, at: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "a bad moment")
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", sometimes)
    assert ShardReader(on_retry=lambda shard, cause: told.append(cause)).read_many(shard, [(0, 2)]) == [b"\x00\x01"]
    assert len(told) == 2
    failures[:] = [errno.EIO] * 9
    assert isinstance(ShardReader().read([(shard, 0, 2)])[(shard, 0, 2)], OSError)


def test_opened_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 3)
    shards = ShardReader()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]))
        assert shards.read_many(str(path), [(0, 1)]) == [bytes([number])]
        shards.will_need(str(path), 0, 1)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_retry_gives_up_with_the_last_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    told: list[str] = []

    def fail() -> Any:
        raise RuntimeError(f"attempt {len(told)}")

    with pytest.raises(OSError, match=r"attempt 2 \(3 attempts\)"):
        retry(fail, told.append, attempts=3)
    assert len(told) == 3


def test_staged_shards_are_read_from_the_copy(shard: str, tmp_path: Path) -> None:
    staged = ShardReader(str(tmp_path / "stage"), 1 << 30)
    assert staged.read_many(shard, [(3, 2)]) == [b"\x03\x04"]
    [copy] = [path for path in (tmp_path / "stage").iterdir() if not path.name.startswith(".")]
    assert copy.read_bytes() == Path(shard).read_bytes()
    os.unlink(shard)
    assert staged.read_many(shard, [(9, 1)]) == [b"\x09"], "the copy is what is open"


def test_a_changed_shard_is_copied_anew(shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    first = stage.get(shard)
    Path(shard).write_bytes(b"other")
    os.utime(shard, ns=(5, 5))
    assert stage.get(shard) != first and Path(stage.get(shard)).read_bytes() == b"other"


def test_the_budget_holds_and_the_least_recently_used_copy_goes(tmp_path: Path) -> None:
    shards = []
    for number in range(4):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes(1000))
        shards.append(str(path))
    stage = Stage(tmp_path / "stage", 2500)
    copies = [stage.get(shards[0]), stage.get(shards[1])]
    os.utime(copies[1], (1, 1))
    third = stage.get(shards[2])
    held = {str(path) for path in (tmp_path / "stage").iterdir() if not path.name.startswith(".")}
    assert held == {copies[0], third}
    large = tmp_path / "large.tar"
    large.write_bytes(bytes(3000))
    assert stage.get(str(large)) == str(large), "what does not fit is read where it lies"


def test_while_another_process_copies_the_original_serves(shard: str, tmp_path: Path) -> None:
    import fcntl

    stage = Stage(tmp_path / "stage", 1 << 30)
    copy = Path(stage.get(shard))
    copy.unlink()
    with (tmp_path / "stage" / f".{copy.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert stage.get(shard) == shard
    assert stage.get(shard) == str(copy)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.stage_dir: .*file/stage"):
        Stage(tmp_path / "file" / "stage", 1)
