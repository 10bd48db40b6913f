"""What `amclip watch` waits for it says; what can never be there it refuses."""

import errno
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from amclip_ds import config as settings
from amclip_ds.checkpoint import retention
from amclip_ds.errors import NotRead, UserError
from amclip_ds.evaluate import watch
from tests.unit.evaluate.test_encoder import write_set


def test_it_says_what_it_waits_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "config.yaml").touch()  # submitted, not begun
    waiting = threading.Thread(target=watch._wait_for, args=(run, 0.01, False), daemon=True)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and capsys.readouterr().out.count(f"waiting for {run}/config.yaml") == 1
    (run / "config.yaml").touch()
    waiting.join(20)
    assert not waiting.is_alive() and not capsys.readouterr().out


def test_lines_that_cannot_be_read_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "eval.jsonl"
    reported = watch._report_unreadable(file, 0)
    assert reported == 0 and not capsys.readouterr().out
    file.write_text('{"step": 3, "wei\nno row\n')
    for expected in (f"{file}: 2 line(s) cannot be read and are left out\n", ""):
        reported = watch._report_unreadable(file, reported)
        assert reported == 2 and capsys.readouterr().out == expected


@pytest.mark.parametrize("once", [True, False])
def test_what_can_never_be_a_run_is_refused(once: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").touch()
    for place, said in (
        ("no/such/run", "missing, and so is"),
        ("file", "not a folder"),
        ("runs", "not a run's folder.*; a run is .*/runs/one$"),
    ):
        with pytest.raises(UserError, match=said):
            watch._wait_for(tmp_path / place, 0.01, once)
    with pytest.raises(UserError, match=r"config\.yaml: missing"):
        watch._wait_for(tmp_path / "later", 0.01, once=True)


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run with no checkpoint, which a STOP file ended: nobody will requeue it."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    words = ["data.train=shards", "run.steps=4", f"run.out={run}", f"eval.data={write_set(tmp_path / 'set')}"]
    (run / "config.yaml").write_text(settings.dump(settings.load("aclip-tiny", words)))
    verdict = {"code": 75, "step": 2, "attempt": 0, "reason": "a STOP file; stopped after step 2"}
    (run / "exit.json").write_text(json.dumps(verdict))
    return run


def test_weights_that_a_run_does_not_keep_are_refused(ended: Path) -> None:
    """It waited for them, and ended with code 0, no row made."""
    assert watch.watch(ended, None, "teacher", 4, 0.01, True) == 0
    words = ["data.train=shards", "run.steps=4", f"run.out={ended}", f"eval.data={ended.parent / 'set'}"]
    (ended / "config.yaml").write_text(settings.dump(settings.load("clip-tiny", words)))
    with pytest.raises(UserError, match="--weights teacher: .*/run keeps none"):
        watch.watch(ended, None, "teacher", 4, 0.01, True)
    assert watch.watch(ended, None, "student", 4, 0.01, True) == 0


def test_it_ends_with_a_run_that_a_stop_file_ended(ended: Path) -> None:
    found: list[int] = []
    watching = threading.Thread(
        target=lambda: found.append(watch.watch(ended, None, "both", 4, 0.01, False)), daemon=True
    )
    watching.start()
    watching.join(20)
    assert found == [0]


def test_trouble_of_the_file_system_is_waited_for_but_not_for_ever(
    ended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also once the run has ended: what it evaluated last would otherwise be missed, with code 0."""
    call, answers = os.listdir, [True]

    def failing(path: Any) -> list[str]:
        if str(path) == str(ended / "checkpoints") and not (answers.pop() if answers else True):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return call(path)

    monkeypatch.setattr(os, "listdir", failing)
    for times, once in ((1, True), (1000, False)):
        answers[:] = [*[False] * times, True]  # the last one first: the stale pins' own
        with pytest.raises(NotRead):
            watch.watch(ended, None, "both", 4, 0.01, once)
    capsys.readouterr()
    answers[:] = [False, False, True]
    assert watch.watch(ended, None, "both", 4, 0.01, False) == 0
    assert capsys.readouterr().out.count("tried again in 0.01 s") == 2


def test_rows_that_cannot_be_written_are_named_before_any_is_made(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a colleague's run. Root, as which tests may run, is denied nothing."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(ended))
    with pytest.raises(UserError, match=r"run/eval\.jsonl: not yours to write; `amclip eval CHECKPOINT --no-append`"):
        watch.watch(ended, None, "both", 4, 0.01, False)


def test_watches_and_persons_each_have_a_pin_of_their_own(tmp_path: Path) -> None:
    """Two tasks of an array load one checkpoint; a person pins it meanwhile. None removes another's."""
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    other = checkpoint / f"{retention.HELD}another-node-17"
    with watch._pinned(checkpoint):
        other.touch()
        watch._remove_stale_pins(tmp_path)  # a third one starts
        assert len(list(checkpoint.glob("pinned*"))) == 2
        (checkpoint / retention.PINNED).touch()
    assert {path.name for path in checkpoint.iterdir()} == {other.name, retention.PINNED}
    assert retention.is_pinned(checkpoint)
    (checkpoint / retention.PINNED).unlink()
    assert retention.is_pinned(checkpoint), "by the other watch alone"
    ended = subprocess.Popen(["true"])
    ended.wait()
    (checkpoint / f"{retention.HELD}{socket.gethostname()}-{ended.pid}").touch()
    os.utime(other, (0, 0))
    watch._remove_stale_pins(tmp_path)
    assert not list(checkpoint.iterdir()) and not retention.is_pinned(checkpoint)
