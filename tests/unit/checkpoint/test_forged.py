"""Checkpoints whose hashes fit but whose values do not: one line that names the file, and the one before is taken."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amclip_ds import files, stored_checkpoints
from amclip_ds.checkpoint import CheckpointConfig, load, manifest, retention, step_folders
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.cli import main
from amclip_ds.errors import FAULT, AmclipError, NotRead, UserError
from tests.distributed.cases_checkpoint_files import holds_step, toy_state
from tests.unit.checkpoint.damage import edit, newest, replace
from tests.unit.checkpoint.test_save import save_steps

GONE = object()
COUNTERS = [f"run.{name}" for name in ("step", "updates", "samples_seen", "epoch")]
COUNTERS += [f"run.guards.{name}" for name in ("skipped_in_a_row", "skipped", "rewinds")]
COUNTERS += ["run.cursor.epoch", "run.cursor.step"]
NO_COUNTS = [GONE, None, -1, True, 2.0, "2", "\u0662", [2], {}, 10**30, float("nan")]
TRAINER = [(key, value) for key in COUNTERS for value in NO_COUNTS]
TRAINER += [("run.step", 3), ("run.updates", 3)]
TRAINER += [(key, value) for key in ("run", "run.guards", "optimizer") for value in (GONE, None, [], "x", 1)]
TRAINER += [("run.cursor", value) for value in (GONE, {}, [], 3, "x", {"epoch": 0})] + [("run.guards", {})]
TRAINER += [("run.guards.window", value) for value in (GONE, None, {}, [None], ["1"], [float("inf")], [True], [[1]])]
TRAINER += [("optimizer.step", value) for value in (None, "1", -1, float("nan"), [], True)]
TRAINER += [("batch", value) for value in (None, [], {"splits": "1"}, {"splits": {}})]
MANIFEST = [
    (key, value) for key in ("step", "world_size", "stage", "attempt") for value in NO_COUNTS if value is not GONE
]
MANIFEST += [(key, GONE) for key in ("step", "world_size", "stage", "precision", "files", "tensors", "shapes", "time")]
MANIFEST += [("stage", 4), ("world_size", 0), ("precision", "int3"), ("precision", []), ("time", float("inf"))]
MANIFEST += [("time", "now"), ("time", True), ("time", -1), ("new", 1), ("step", 3), ("drift", {}), ("drift", [1])]
MANIFEST += [
    (key, value) for key in ("files", "tensors", "shapes", "hashes", "versions") for value in ([], None, "x", 1)
]
MANIFEST += [("shapes.seven", value) for value in (GONE, [8], [-7, -1], ["7"], 7, [7.0], [True] * 7, [1] * 17)]
MANIFEST += [("tensors.master.seven", value) for value in (8, "7", None, 7.0)] + [("tensors.\u0662", {"a": 1})]
MANIFEST += [("files.config\u200byaml", {"bytes": 1, "sha256": "0" * 64}), ("hashes.data", 1)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(root, 1, 2)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def fail_at_open(monkeypatch: pytest.MonkeyPatch, path: Path, number: int, times: int) -> None:
    """The file system does not give a file, so many times."""
    call, left = os.open, [number] * times

    def failing(asked: Any, *words: Any, **more: Any) -> int:
        if left and str(asked) == str(path):
            raise OSError(left.pop(), os.strerror(number), str(asked))
        return call(asked, *words, **more)

    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    monkeypatch.setattr(os, "open", failing)


FILES = [
    "manifest.json",
    "trainer.json",
    "config.yaml",
    "model/rank0000.safetensors",
    "optim/rank0000.safetensors",
    "replicated.safetensors",
    "rng/rank0000.json",
]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN])
@pytest.mark.parametrize("name", FILES)
def test_trouble_of_the_file_system_is_no_damage(
    name: str, number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outlasted; where it lasts, the machine's code, and no older checkpoint is taken for it."""
    state = toy_state(0, 0, 1)
    fail_at_open(monkeypatch, root / "step_00000002" / name, number, 2)
    found = load.find(root, "auto", True, Ranks())
    assert found is not None and found.manifest.step == 2 and not found.notes
    load.fill(found, state, Ranks())
    assert holds_step(state, 2)
    monkeypatch.undo()
    fail_at_open(monkeypatch, root / "step_00000002" / name, number, 10_000)
    for fallback in (True, False):
        with pytest.raises(AmclipError, match=f"step_00000002/{name}.*{os.strerror(number)}") as caught:
            load.find(root, "auto", fallback, Ranks())
        assert caught.value.exit_code == FAULT and caught.value.is_shared


@pytest.mark.parametrize("name", ["model/rank0000.safetensors", "replicated.safetensors"])
def test_so_is_it_while_the_state_is_filled(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, state = load.find(root, "auto", False, Ranks()), toy_state(0, 0, 1)
    assert found is not None
    preadv, left = os.preadv, [errno.EIO] * 2

    def failing(file: int, *words: Any) -> int:
        if left and os.readlink(f"/proc/self/fd/{file}").endswith(name):
            raise OSError(left.pop(), "Input/output error")
        return preadv(file, *words)

    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    monkeypatch.setattr(os, "preadv", failing)
    load.fill(found, state, Ranks())
    assert holds_step(state, 2) and not left
    left[:] = [errno.EIO] * 1000
    with pytest.raises(AmclipError, match=f"{name}.*Input/output error") as caught:
        load.fill(found, state, Ranks())
    assert caught.value.exit_code == FAULT


def test_a_list_of_checkpoints_that_cannot_be_read_just_now_is_outlasted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir, left = os.listdir, [errno.ESTALE] * 2

    def failing(path: Any) -> list[str]:
        if left:
            raise OSError(left.pop(), "Stale file handle", str(path))
        return listdir(path)

    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    monkeypatch.setattr(os, "listdir", failing)
    found = load.find(root, "auto", False, Ranks())
    assert found is not None and found.manifest.step == 2
    left[:] = [errno.ESTALE] * 1000
    with pytest.raises(AmclipError, match="Stale file handle") as caught:
        load.find(root, "auto", True, Ranks())
    assert caught.value.exit_code == FAULT


def test_nothing_is_pruned_by_what_cannot_be_read_just_now(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_open(monkeypatch, root / "step_00000001" / "manifest.json", errno.EIO, 1000)
    with pytest.raises(NotRead, match="step_00000001/manifest.json: Input/output error"):
        stored_checkpoints.prune(root, CheckpointConfig(keep_last=9), remove_damaged=True, remove_aside=False)
    monkeypatch.undo()
    assert [step for step, _ in step_folders.list_steps(root)] == [1, 2]


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        content = content[parent]
    if value is GONE:
        del content[last]
    else:
        content[last] = value


def forge(root: Path, name: str, key: str, value: Any) -> None:
    if name == "manifest.json":
        edit(root, lambda content: put(content, key, value), seal=True)
        return
    content = json.loads((newest(root) / name).read_text())
    put(content, key, value)
    replace(root, name, json.dumps(content).encode())


def is_refused_and_passed_over(root: Path, named: str) -> None:
    with pytest.raises(DamagedError) as damaged:
        manifest.verify(newest(root))
    assert named in str(damaged.value) and "\n" not in str(damaged.value)
    with pytest.raises(UserError, match="damaged checkpoint"):
        load.find(root, "auto", False, Ranks())
    older = load.find(root, "auto", True, Ranks())
    assert older is not None and older.manifest.step == 1 and older.notes[0][0] == "checkpoint_fallback"


def test_the_forger_can_be_right(root: Path) -> None:
    """The twin: what is sealed again with fitting values is taken."""
    for key, value in (("run.updates", 1), ("run.cursor", None), ("run.guards.window", []), ("optimizer", {})):
        forge(root, "trainer.json", key, value)
    found = load.find(root, "auto", False, Ranks())
    assert found is not None and found.small["run"]["updates"] == 1


def test_no_forged_value_is_taken(root: Path) -> None:
    for name, forged in (("trainer.json", TRAINER), ("manifest.json", MANIFEST)):
        whole = {file: file.read_bytes() for file in newest(root).glob("*.json")}
        for key, value in forged:
            forge(root, name, key, value)
            with pytest.raises(DamagedError) as damaged:
                manifest.verify(newest(root))
            assert name in str(damaged.value) and "\n" not in str(damaged.value), (key, value)
            for file, content in whole.items():
                file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("trainer.json", "run.cursor", {}),
        ("trainer.json", "run.guards", {}),
        ("manifest.json", "shapes.seven", GONE),
        ("rng/rank0000.json", "numpy", [1]),
        ("rng/rank0000.json", "python", GONE),
    ],
)
def test_a_forged_one_is_passed_over_as_any_damage(root: Path, name: str, key: str, value: Any) -> None:
    forge(root, name, key, value)
    is_refused_and_passed_over(root, name)


def test_commands_say_it_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forge(root, "trainer.json", "run.cursor", {})
    assert main(["checkpoints", str(root.parent), "verify"]) == 2
    assert "damaged: " in (printed := capsys.readouterr().out) and "run.cursor" in printed
    forge(root, "manifest.json", "step", True)
    assert main(["checkpoints", str(root.parent)]) == 0  # lists it, as invalid
    assert "step has not the type" in " ".join(capsys.readouterr().out.split())


STRANGERS: dict[str, Callable[[Path], object]] = {
    "digits of another script": lambda root: (root / "step_0000000\u0663").mkdir(),
    "a name with a newline": lambda root: (root / "step_00000003\n").mkdir(),
    "more zeros": lambda root: (root / "step_000000003").mkdir(),
    "a sign": lambda root: (root / "step_-0000003").mkdir(),
    "too many digits": lambda root: (root / f"step_{'3' * 30}").mkdir(),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_names_that_are_none_of_ours_are_no_checkpoints_and_stay(root: Path, stranger: str) -> None:
    STRANGERS[stranger](root)
    assert [step for step, _ in step_folders.list_steps(root)] == [1, 2]
    before = sorted(os.listdir(root))
    assert main(["checkpoints", str(root.parent), "prune", "--keep-last", "2", "--damaged", "--set-aside"]) == 0
    assert sorted(os.listdir(root)) == before


def test_nothing_outside_the_run_is_removed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    for name in ("step_00000003", "superseded-step_00000004-0", ".del-step_00000005-0", "superseded-notes"):
        (root / name).symlink_to(tmp_path / "mine")
    retention.tidy(root)
    assert main(["checkpoints", str(root.parent), "prune", "--keep-last", "1", "--damaged", "--set-aside"]) == 0
    assert (tmp_path / "mine" / "file").read_text() == "precious"
    assert sorted(os.listdir(root)) == ["latest", "step_00000002", "superseded-notes"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoints").symlink_to(root)
    assert main(["checkpoints", str(other), "prune", "--keep-last", "1"]) == 2
    assert "a link out of the run" in capsys.readouterr().err and (root / "step_00000002").is_dir()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").write_text("")
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "checkpoints: not a folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        load.find(tmp_path / "checkpoints", "auto", True, Ranks())
    with pytest.raises(UserError, match="cannot be read"):
        stored_checkpoints.choose(tmp_path / "checkpoints", None)


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 4 << 30)


@pytest.mark.parametrize("trap", [os.mkfifo, Path.mkdir, make_sparse, lambda path: path.symlink_to("/dev/zero")])
def test_latest_that_is_no_small_file_holds_nobody(root: Path, trap: Callable[[Path], object]) -> None:
    (root / "latest").unlink()
    trap(root / "latest")
    found = load.find(root, "auto", False, Ranks())
    assert found is not None and found.manifest.step == 2 and found.notes[0][0] == "checkpoint_latest"
