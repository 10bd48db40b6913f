"""Reading by offset: neighbours in one go, bad moments of a file system, copies on a local disk within a budget."""

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.shards import reader
from amclip_ds.shards.reader import GAP, ShardReader, retry


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


def test_a_bad_moment_of_a_network_file_system_is_repeated_and_reported(
    shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    reported: list[str] = []
    pread, failures = os.pread, [errno.ESTALE, errno.EIO]

    def sometimes(file: int, size: int, at: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "a bad moment")
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", sometimes)
    assert ShardReader(on_retry=lambda shard, cause: reported.append(cause)).read_many(shard, [(0, 2)]) == [b"\x00\x01"]
    assert len(reported) == 2
    failures[:] = [errno.EIO] * 9
    assert isinstance(ShardReader().read([(shard, 0, 2)])[(shard, 0, 2)], OSError)


def test_opened_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN", 3)
    shards = ShardReader()

    def opened() -> int:  # of these; an earlier test's threads may close theirs at any time
        paths = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                paths.append(os.readlink(f"/proc/self/fd/{name}"))
        return sum(path.startswith(str(tmp_path)) for path in paths)

    for number in range(10):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]))
        assert shards.read_many(str(path), [(0, 1)]) == [bytes([number])]
        shards.will_need(str(path), 0, 1)
        assert 1 <= opened() <= 3
    shards.close()
    assert opened() == 0


def test_retry_gives_up_with_the_last_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    reported: list[str] = []

    def fail() -> Any:
        raise RuntimeError(f"attempt {len(reported)}")

    with pytest.raises(OSError, match=r"attempt 2 \(3 attempts\)"):
        retry(fail, reported.append, attempts=3)
    assert len(reported) == 3
