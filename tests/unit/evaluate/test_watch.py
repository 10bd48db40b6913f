"""What `amclip watch` waits for it says; what can never be there it refuses."""

import threading
import time
from pathlib import Path

import pytest

from amclip_ds.errors import UserError
from amclip_ds.evaluate import watch


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
        ("runs", "no run, but .*/runs/one is one"),
    ):
        with pytest.raises(UserError, match=said):
            watch._wait_for(tmp_path / place, 0.01, once)
    with pytest.raises(UserError, match=r"config\.yaml: missing"):
        watch._wait_for(tmp_path / "later", 0.01, once=True)
