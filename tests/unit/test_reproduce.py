"""The patch beside a run: it is the last start's, and is shown and packed for a revision with changes alone."""

import json
import shlex
import tarfile
from pathlib import Path

import pytest

from amclip_ds import config as settings
from amclip_ds import reproduce, run_folder
from amclip_ds.doctor import OK, WARN
from amclip_ds.files import write_atomically


def test_a_clean_start_removes_the_patch_of_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = settings.load("clip-tiny", ["data.train=x", f"run.out={tmp_path}"])
    for changes in ("a patch\n", "another\n", "", ""):
        monkeypatch.setattr(run_folder, "git_changes", lambda changes=changes: changes)
        run_folder.write_settings(tmp_path, run, write_atomically)
        patch = tmp_path / "changes.diff"
        assert patch.exists() == bool(changes) and (not changes or patch.read_text() == changes)


def test_the_first_steps_are_those_that_count(tmp_path: Path) -> None:
    """Attempt 0 was thrown away (`--resume never`), 1 began anew on two ranks, 2 continued from its step 2 on one."""
    (run := tmp_path / "run").mkdir()

    def write(name: str, *rows: dict) -> None:
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def steps(attempt: int, *numbers: int) -> list[dict]:
        return [{"step": step, "attempt": attempt, "loss": attempt + step / 10} for step in numbers]

    write("metrics.superseded.jsonl", *steps(0, 1, 2, 3), *steps(1, 3))
    write("metrics.jsonl", *steps(1, 1, 2), *steps(2, 3))
    starts = [
        {"step": 0, "event": "start", "attempt": number, "world_size": world} for number, world in enumerate((4, 2, 1))
    ]
    write("timeline.jsonl", *starts, {"step": 2, "event": "resumed", "attempt": 2})
    (run / "out.log").write_text("run: 9 steps of 8 = 4 ranks x 2\n")
    (run / "plan.json").write_text(json.dumps({"predicted": {"world_size": 1}}))
    assert reproduce.first_rows(run, 3) == steps(1, 1, 2, 3)
    reproduce.pack(run, [], tmp_path / "capsule.tar.gz")
    with tarfile.open(tmp_path / "capsule.tar.gz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    for folder in (run, tmp_path / "there" / "capsule"):
        assert reproduce.first_world(folder) == 2 and reproduce.first_rows(folder, 2) == steps(1, 1, 2)
    (run / "timeline.jsonl").unlink()
    assert reproduce.first_world(run) == 4, "of a run that left none: its log"


@pytest.mark.parametrize("here", ["1" * 40, "2" * 40])
def test_a_patch_belongs_to_a_revision_with_changes_alone(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun with changes and resumed from a clean checkout: by a version that left the patch."""
    monkeypatch.setattr(run_folder, "git_changes", lambda: "")
    (run := tmp_path / "a run").mkdir()
    (run / "changes.diff").write_text("a patch\n")
    for revision, has_patch in (("1" * 40, False), ("1" * 40 + "+changes", True)):
        (run / "versions.json").write_text(json.dumps({"git": revision}))
        [found] = reproduce._revision(run, {"git": revision}, {"git": here})
        assert ("changes.diff" in found.found) == ("git apply" in found.fix) == has_patch
        assert (found.status == OK) == (here == revision) and found.status in (OK, WARN)
        assert not has_patch or shlex.split(found.fix)[-1] == str(run / "changes.diff"), "another folder's command too"
        assert ("changes too" in found.found) is False
        capsule = tmp_path / f"{has_patch}.tar.gz"
        reproduce.pack(run, [], capsule)
        with tarfile.open(capsule) as tar:
            assert any(name.endswith("/changes.diff") for name in tar.getnames()) == has_patch
