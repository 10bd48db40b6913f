"""Copies of shards on a shared local disk: within a budget, and never anybody else's."""

import fcntl
import os
from pathlib import Path

import pytest

from amclip_ds.errors import UserError
from amclip_ds.shards.reader import ShardReader
from amclip_ds.shards.stage import Stage

CONTENT = bytes(range(256)) * 64


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    return str(path)


def read(stage: Stage, shard: str) -> bytes | None:
    """What the shard's copy holds; None where the shard itself serves."""
    descriptor = stage.open(shard)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def copies(stage: Stage) -> list[str]:
    return sorted(path.name for path in stage.folder.iterdir() if not path.name.startswith("."))


def test_staged_shards_are_read_from_the_copy(shard: str, tmp_path: Path) -> None:
    staged = ShardReader(str(tmp_path / "stage"), 1 << 30)
    assert staged.read_many(shard, [(3, 2)]) == [b"\x03\x04"]
    os.unlink(shard)
    assert staged.read_many(shard, [(9, 1)]) == [b"\x09"], "the copy is what is open"
    staged.close()


def test_copies_are_this_users_alone(shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    assert read(stage, shard) == CONTENT
    assert stage.folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in stage.folder.iterdir())


def test_a_changed_shard_is_copied_anew(shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    assert read(stage, shard) == CONTENT
    Path(shard).write_bytes(b"other")
    os.utime(shard, ns=(5, 5))
    assert read(stage, shard) == b"other" and len(copies(stage)) == 2


def test_the_budget_holds_and_the_least_recently_used_copy_goes(tmp_path: Path) -> None:
    shards = []
    for number in range(4):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes(1000))
        shards.append(str(path))
    stage = Stage(tmp_path / "stage", 2500)
    assert read(stage, shards[0]) and read(stage, shards[1])
    os.utime(stage.folder / stage.name_of(shards[1]), (1, 1))
    assert read(stage, shards[2])
    assert copies(stage) == sorted(map(stage.name_of, (shards[0], shards[2])))
    large = tmp_path / "large.tar"
    large.write_bytes(bytes(3000))
    assert read(stage, str(large)) is None, "what does not fit is read where it is"


def test_while_another_process_copies_the_original_serves(shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    with (stage.folder / f".{stage.name_of(shard)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read(stage, shard) is None
    assert read(stage, shard) == CONTENT


def test_what_a_killed_copy_left_is_removed(shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", len(CONTENT))
    for left in (stage.name_of(shard), "0123-other.tar"):
        (stage.folder / f".{left}.partial").write_bytes(bytes(len(CONTENT)))
    assert read(stage, shard) == CONTENT
    assert not list(stage.folder.glob("*.partial"))


# What others put there


@pytest.mark.parametrize("kind", ["link", "hard link", "shorter", "pipe", "folder"])
def test_what_is_no_copy_of_ours_is_not_read(kind: str, shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    poison = tmp_path / "poison"
    poison.write_bytes(b"\1" * len(CONTENT))
    copy = stage.folder / stage.name_of(shard)
    if kind == "link":
        copy.symlink_to(poison)
    elif kind == "hard link":
        copy.hardlink_to(poison)
    elif kind == "shorter":
        copy.write_bytes(CONTENT[:-1])
    elif kind == "pipe":
        os.mkfifo(copy)
    else:
        copy.mkdir()
    assert read(stage, shard) == (None if kind == "folder" else CONTENT)
    assert poison.read_bytes() == b"\1" * len(CONTENT)


@pytest.mark.parametrize("name", [".{}.lock", ".{}.partial", "{}"])
def test_a_link_in_the_place_of_our_files_empties_nothing(name: str, shard: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (stage.folder / name.format(stage.name_of(shard))).symlink_to(victim)
    assert read(stage, shard) in (None, CONTENT)
    assert victim.read_text() == "precious"


def test_a_folder_that_is_not_ours_alone_is_refused(tmp_path: Path) -> None:
    for number, make in enumerate(
        (
            lambda folder: (folder.mkdir(), folder.chmod(0o777)),
            lambda folder: (tmp_path / "else").mkdir() or folder.symlink_to(tmp_path / "else"),
            lambda folder: folder.touch(),
        )
    ):
        stage = tmp_path / f"stage{number}"
        stage.mkdir()
        make(stage / f"amclip-{os.geteuid()}")
        with pytest.raises(UserError, match=r"data\.stage_dir: .*amclip-"):
            Stage(stage, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / f"amclip-{os.geteuid()}").mkdir(mode=0o700)
    os.chown(tmp_path / f"amclip-{os.geteuid()}", 65534, 65534)
    with pytest.raises(UserError, match="is another user's"):
        Stage(tmp_path, 1)


def test_a_folder_put_in_the_place_of_ours_later_is_not_opened(shard: str, tmp_path: Path) -> None:
    """Whoever may write in the shared folder may rename ours."""
    stage = Stage(tmp_path / "stage", 1 << 30)
    name = stage.name_of(shard)
    stage.folder.rename(tmp_path / "stage" / "moved")
    stage.folder.mkdir()
    (stage.folder / name).write_bytes(b"\1" * len(CONTENT))
    assert read(stage, shard) == CONTENT


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.stage_dir: .*file/stage"):
        Stage(tmp_path / "file" / "stage", 1)
