"""A start or a resume on a disk that is full, over quota or broken: the machine's fault, code 1, and one line."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from amclip_ds import distill, files, jsonl, pictures, reproduce
from amclip_ds.checkpoint import step_folders
from amclip_ds.data import prepare
from amclip_ds.data.config import DataConfig
from amclip_ds.engine.ds_config import EngineConfig, read_ds_config
from amclip_ds.errors import FAULT, MISTAKE, AmclipError, NotRead, UserError
from amclip_ds.evaluate import datasets
from amclip_ds.model import pretrained
from amclip_ds.run_folder import write_weights
from amclip_ds.shards.index import Index, build_index
from amclip_ds.shards.inputs import check_index_folder
from tests.conftest import ROOT
from tests.unit.data.shards import write_shards

FULL_DISK = """
import contextlib, errno, os, sys
from pathlib import Path
from amclip_ds import config, json_file, slurm_attempt
from amclip_ds.data import pack
from amclip_ds.evaluate import suites
from amclip_ds.shards.index import build_index
from amclip_ds.errors import AmclipError
from amclip_ds.resilience.ownership import OwnershipConfig, claim
from amclip_ds.run_folder import open_folder
disk, shards = Path(sys.argv[1]), Path(sys.argv[2])
(disk / "begun").mkdir()
with contextlib.suppress(OSError):
    for number in range(1000): (disk / f"fill{number}").touch()
begin = ["begin", "--job", "9", "--nodes", "1", "--tasks", "1", "--", "aclip-tiny", f"data.train={shards}"]
def settings(run): return config.load("aclip-tiny", [f"data.train={shards}", f"run.out={run}"])
for name, start in {
    "folder": lambda run: open_folder(settings(run)),
    "owner": lambda run: claim(run, OwnershipConfig()),
    "json": lambda run: json_file.write(run.with_suffix(".json"), {}),
    "csv": lambda run: suites.write_csv(run.with_suffix(".csv"), [], "model"),
    "pack": lambda run: pack._open_record(run, {"pack": 1}),
    "index": lambda run: build_index([str(path) for path in sorted(shards.glob("*.tar"))], run, 1),
}.items():
    for run in (disk / "new", disk / "begun"):
        try:
            start(run)
            print(name, "began")
        except AmclipError as error:
            print(name, error.exit_code, error)
print("slurm", slurm_attempt.main([*begin, f"run.out={disk}/new"]))
"""


def test_a_start_on_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    """A real file system, in which not even an empty file has a place left."""
    write_shards(tmp_path / "shards", (2,))
    disk, program = tmp_path / "disk", tmp_path / "program.py"
    disk.mkdir()
    program.write_text(FULL_DISK)
    mount = 'mount -t tmpfs -o size=64k,nr_inodes=8 none "$0" && exec "$@"'
    argv = ["unshare", "-rm", "sh", "-c", mount, str(disk)]
    if not shutil.which("unshare") or subprocess.run([*argv, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [*argv, sys.executable, program, disk, tmp_path / "shards"],
        cwd=ROOT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ended = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [(name, code) for name, code, *_ in ended] == [
        *(("folder", "1"), ("folder", "1"), ("owner", "1"), ("owner", "1")),
        *((name, "1") for name in ("json", "csv", "pack", "index") for _ in range(2)),
        ("slurm", "1"),
    ], done.stdout
    assert all("No space left on device; once that is over" in line[2] for line in ended[:-1]), done.stdout


OF_A_FILE_SYSTEM = [  # Lustre's eviction, a dead FUSE mount, and others
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.ENOTCONN),
    *(errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EKEYEXPIRED),
]


@pytest.mark.parametrize("number", OF_A_FILE_SYSTEM)
def test_what_is_the_machines_fault(number: int) -> None:
    error = files.not_written("run.out: run", OSError(number, os.strerror(number), "run"))
    assert error.exit_code == FAULT and os.strerror(number) in str(error)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EROFS, errno.ENOENT])
def test_what_its_user_can_set_right(number: int) -> None:
    assert files.not_written("run.out: run", OSError(number, os.strerror(number), "run")).exit_code == MISTAKE


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, FAULT), (errno.ESTALE, FAULT), (errno.EACCES, MISTAKE)])
def test_what_cannot_be_read_just_now_is_the_machines_fault(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an index too, which is then not made again."""
    shards = write_shards(tmp_path / "shards", (2,))
    build_index(shards, tmp_path / "index", 1)

    def failing(*words: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "read", failing)
    path = tmp_path / "index" / "meta.json"
    for read in (lambda: files.read_text(path), lambda: files.read_json(path, dict), lambda: Index(path.parent)):
        with pytest.raises(UserError, match=os.strerror(number)) as caught:
            read()
        assert caught.value.exit_code == code
    if code == FAULT:
        monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
        with pytest.raises(NotRead, match="data.index: .*once that is over, the same command resumes"):
            prepare.find_sources(
                DataConfig(train=str(path.parents[1] / "shards"), index=str(path.parent)), print, lambda work: work()
            )


@pytest.mark.parametrize(("number", "code"), [(errno.ESTALE, FAULT), (errno.EACCES, MISTAKE)])
def test_who_names_the_key_keeps_whose_fault_it_is(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting put before the error had made code 2 of code 1, a mistake that a restart would only repeat."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "student.safetensors", "pairs.tar", "attempts.jsonl"):
        (run / name).write_bytes(b"x" * 1024)
    readers = {
        "eval.data: ": lambda: datasets.open_set(str(run / "pairs.tar"), key="eval.data"),
        "distill.teacher: ": lambda: distill.check_export(str(run)),
        "model.init_from: ": lambda: pretrained._keys(run / "student.safetensors"),
        "engine.deepspeed: ": lambda: read_ds_config(EngineConfig()),
        "data.index: ": lambda: check_index_folder(run, "data.index"),
        f"{run}/attempts.jsonl: ": lambda: jsonl.read(run / "attempts.jsonl"),
        f"{run}: cannot be read: ": lambda: step_folders.list_steps(run),
    }

    def failing(*words: object, **named: object) -> int:
        raise OSError(number, os.strerror(number))

    for begins, read in readers.items():
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", failing)
            patched.setattr(os, "listdir", failing)
            with pytest.raises(UserError) as caught:
                read()
        assert str(caught.value).startswith(begins) and os.strerror(number) in str(caught.value), caught.value
        assert caught.value.exit_code == code, caught.value
        if code == FAULT:
            assert str(caught.value).endswith("once that is over, the same command resumes"), caught.value


def test_nothing_is_left_of_a_file_that_does_not_come_to_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights above all: on a full disk what is left of them would take the place of the next checkpoint."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "config.yaml").write_text("a: 1\n")
    monkeypatch.setattr(pictures, "draw", lambda *words: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(pictures, "captions_of", lambda batch: [])
    record = SimpleNamespace(folder=tmp_path, masks=lambda *words: None)
    run: Any = SimpleNamespace(_batch=0, _method=None, _record=record, _row=lambda step, shot: {})
    shot: Any = None
    writers = {
        "student.safetensors": lambda name: write_weights(tmp_path / name, {"a": torch.zeros(4)}, {"step": "1"}),
        "capsule.tar.gz": lambda name: reproduce.pack(tmp_path, [], tmp_path / name),
        "pictures/masks.png": lambda name: pictures.Pictures._store(run, 1, shot),
    }

    def full(path: Path, target: Path) -> None:
        assert path.stat().st_size and path.name.endswith(".partial")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, write in writers.items():
        with monkeypatch.context() as patched, pytest.raises((OSError, AmclipError), match="No space left on device"):
            patched.setattr(Path, "replace", full)
            write(name)
        assert not list(tmp_path.rglob("*.partial")), name
        write(name)
        assert (tmp_path / name).stat().st_size
