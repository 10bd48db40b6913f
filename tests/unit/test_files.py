"""Small files from outside: ordinary ones only, never more than a limit, one line that names the file."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from amclip_ds import files, json_file
from amclip_ds.errors import UserError
from amclip_ds.run_folder import write_weights
from amclip_ds.shards.index import build_index
from tests.unit.data.shards import write_shards


@pytest.mark.parametrize("what", ["weights", "index"])
def test_what_a_rename_shows_is_durable(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content before the rename, its name before the function returns: exit.json says 0 next."""
    shards, done = write_shards(tmp_path / "data", (3,)), []
    fsync, replace = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(f"{Path(source).name} -> {Path(target).name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", renamed)
    if what == "weights":
        write_weights(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {"step": "1"})
        assert done == [".a.safetensors.partial", ".a.safetensors.partial -> a.safetensors", tmp_path.name]
        return
    build_index(shards, tmp_path / "index", 1)
    *parts, folder, shown, parent = done
    assert sorted(parts) == ["content.bin", "keys.bin", "meta.json", "samples.bin"]
    assert folder.endswith(".partial") and shown == f"{folder} -> index" and parent == tmp_path.name


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    signal.alarm(10)
    yield
    signal.alarm(0)


def _listen(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.close()


TRAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not an ordinary file"),
    "socket": (_listen, "No such device or address|not an ordinary file"),
    "folder": (Path.mkdir, "not an ordinary file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not an ordinary file"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "No such device|not an ordinary file"),
    "nothing": (lambda path: path.symlink_to("nowhere"), "missing"),
    "itself": (lambda path: path.symlink_to(path.name), "Too many levels"),
    "sparse": (lambda path: os.truncate(_touched(path), 4 << 30), "more than the 1048576 bytes"),
    "proc": (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\0\1"), "not UTF-8|not JSON"),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_one_line_and_holds_nobody(tmp_path: Path, trap: str) -> None:
    make, said = TRAPS[trap]
    make(tmp_path / "file")
    for read in (lambda: files.read_text(tmp_path / "file"), lambda: files.read_json(tmp_path / "file", dict, 1 << 20)):
        with pytest.raises(UserError, match=said) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path}/file: ") and "\n" not in str(caught.value)


def test_an_ordinary_file_is_read_also_through_a_link_unless_that_is_excluded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"ä": 1}')
    (tmp_path / "link").symlink_to("file")
    assert files.read_json(tmp_path / "link", dict) == {"ä": 1} and files.is_regular(tmp_path / "link")
    with pytest.raises(UserError, match="symbolic link"):
        files.read_text(tmp_path / "link", follow=False)
    assert files.read_text(tmp_path / "file", limit=9) == '{"ä": 1}'
    with pytest.raises(UserError, match="more than the 8 bytes"):
        files.read_text(tmp_path / "file", limit=8)


@pytest.mark.parametrize("text", ["[1]", "null", "", "[" * 100_000, "1" * 5000, '{"a": 1'])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match="JSON"):
        files.read_json(tmp_path / "file", dict)


def test_an_atomic_write_goes_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".exit.json.{os.getpid()}.partial").symlink_to("victim")
    (tmp_path / "exit.json").symlink_to("victim")
    files.write_atomically(tmp_path / "exit.json", "new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "exit.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exit.json", "victim"]


def test_a_sparse_file_over_the_limit_takes_no_memory(tmp_path: Path) -> None:
    """Twin: one byte of it more than the limit is refused all the same, where no size is known."""
    import tracemalloc

    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(OSError, match="more than the 268435456 bytes"):
        files.read_bytes(tmp_path / "holes", 1 << 28)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()
    with pytest.raises(OSError, match="more than the 10 bytes"):
        files.read_bytes(Path("/proc/self/status"), 10)


@pytest.mark.parametrize("head", [b"data/00000.jpg\0\0", b"PK\3\4", b"steps: 5\n", b"\0" * 20])
def test_an_output_never_replaces_a_file_of_another_kind(head: bytes, tmp_path: Path) -> None:
    """`amclip data check --json 0.tar 1.tar` would write its report over the first shard."""
    (tmp_path / "0.tar").write_bytes(head)
    for begins, at in (((b"{", b"["), 0), ((b"<",), 0), ((b"{",), 8)):
        with pytest.raises(UserError, match="--json .*0.tar: holds something else; name a new file"):
            files.check_output(tmp_path / "0.tar", "--json", begins, at)
    for content in (b"", b'\n{"a": 1}'):  # mktemp's; an earlier one
        (tmp_path / "0.tar").write_bytes(content)
        json_file.check(tmp_path / "0.tar")
    (tmp_path / "w.safetensors").write_bytes(bytes(8) + b"{}")
    files.check_output(tmp_path / "w.safetensors", "--out", (b"{",), at=8)
