"""A run's files on disks that fail: nothing is raised, rows are late but in order, what is lost is counted."""

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from amclip_ds import jsonl
from amclip_ds.jsonl import read_lines
from amclip_ds.record import LogConfig, Record, backlog, tensorboard_events
from amclip_ds.record.backlog import Backlog
from tests.conftest import ROOT
from tests.unit.test_record import ROW

Recorder = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "RETRY_S", 0.0)


def rows(*numbers: int) -> list[bytes]:
    return [jsonl.encode({"step": number}) for number in numbers]


def test_rows_that_a_folder_does_not_take_come_later_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is a file for a while: ENOTDIR, like any other error."""
    folder, reported = tmp_path / "run", Recorder()
    folder.touch()
    held = Backlog(lambda *what: reported.append(what))
    for row in rows(1, 2, 3):
        held.append(folder / "metrics.jsonl", row)
    held.append(folder / "out.log", b"a line\n")
    held.replace(folder / "config.yaml", "old\n")
    held.replace(folder / "config.yaml", "new\n")
    [line] = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl cannot be written (Not a directory): the work continues" in line and not reported

    folder.unlink()
    folder.mkdir()
    held.append(folder / "metrics.jsonl", rows(4)[0])
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (folder / "out.log").read_text() == "a line\n" and (folder / "config.yaml").read_text() == "new\n"
    [(cause, outcome)] = reported
    assert "Not a directory" in cause and "4 of metrics.jsonl" in outcome and "nothing is lost" in outcome
    [line] = capsys.readouterr().err.splitlines()
    assert "can be written again" in line
    held.append(folder / "metrics.jsonl", rows(5)[0])
    held.close()
    assert len(read_lines(folder / "metrics.jsonl")) == 5 and not capsys.readouterr().err


def test_memory_has_a_bound_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backlog, "MAX_HELD", 60)
    folder, reported = tmp_path / "run", Recorder()
    held = Backlog(lambda *what: reported.append(what))
    for row in rows(*range(10, 20)):  # 13 bytes each: 4 fit
        held.append(folder / "metrics.jsonl", row)
    folder.mkdir()
    held.close()
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [16, 17, 18, 19]
    assert "lost: 6 of metrics.jsonl" in reported[0][1]
    capsys.readouterr()

    gone = Backlog(lambda *what: reported.append(what))
    gone.append(tmp_path / "no" / "metrics.jsonl", rows(1)[0])
    assert not gone.close(patience_s=0)
    assert "to the end; lost: 1 of metrics.jsonl" in capsys.readouterr().err and len(reported) == 1


def test_threads_share_one(tmp_path: Path) -> None:
    held = Backlog(lambda *_: None)
    threads = [
        threading.Thread(target=lambda: [held.append(tmp_path / "a.jsonl", row) for row in rows(*range(50))])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_lines(tmp_path / "a.jsonl")) == 200


def record(folder: Path, rank: int = 0) -> Record:
    return Record(
        folder, LogConfig(every_steps=1), rank=rank, world_size=2, attempt=0, total_steps=25, samples_per_epoch=1000
    )


def events_of(folder: Path) -> list[int]:
    """The steps whose loss TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [event.step for event in found.Scalars("loss")]


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 5)):  # a second attempt that resumes behind step 2
        pen = Record(
            tmp_path,
            LogConfig(every_steps=1),
            rank=0,
            world_size=2,
            attempt=0,
            total_steps=25,
            samples_per_epoch=1000,
            first_step=first - 1,
        )
        pen._events = pen._events.with_name(f"{tensorboard_events.file_name()}{first}")
        with pen:
            for step in range(first, last + 1):
                pen.metrics(ROW | {"step": step})
    assert events_of(tmp_path / "tensorboard") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("how", ["removed", "a file", "a link to nowhere"])
def test_a_lost_tensorboard_folder_costs_its_events_alone(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    with record(tmp_path) as pen:
        pen.metrics(ROW | {"step": 1})
        shutil.rmtree(folder)
        if how == "a file":
            folder.touch()
        elif how != "removed":
            folder.symlink_to(tmp_path / "nowhere")
        pen.metrics(ROW | {"step": 2})
        if how != "removed":
            folder.unlink()
        pen.metrics(ROW | {"step": 3})
    assert events_of(folder) == [2, 3]
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    kinds = [row["kind"] for row in read_lines(tmp_path / "incidents.jsonl")]
    assert kinds == ([] if how == "removed" else ["record_held"])


def test_a_tracker_that_raises_is_one_incident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(
        "class Run:\n"
        "    def log(self, numbers, step):\n"
        "        if step < 3: raise ConnectionError('no route to host')\n"
        "    def finish(self): raise TimeoutError\n"
        "def init(**settings): return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    config = LogConfig(every_steps=1, wandb_project="p", tensorboard=False)
    with Record(run, config, rank=0, world_size=1, attempt=0, total_steps=5, samples_per_epoch=9) as pen:
        for step in range(1, 5):
            pen.metrics(ROW | {"step": step})
    monkeypatch.delitem(sys.modules, "wandb")
    assert [row["cause"] for row in read_lines(run / "incidents.jsonl")] == [
        "ConnectionError: no route to host",
        "TimeoutError: ",
    ]


SMALL_DISK = """
import errno, json, os, subprocess, sys
from pathlib import Path
from amclip_ds.record import backlog
backlog.RETRY_S = 0.0
from amclip_ds.run_folder import write_verdict
from tests.unit.test_backlog import record
from tests.unit.test_record import ROW
run = Path(sys.argv[1])
fill = run / "fill"
other = record(run, rank=1)
with record(run) as pen:
    def step(number):
        pen.metrics(ROW | {"step": number})
        pen.sample_ids(number, list(range(100)))
        pen.evaluation([{"step": number, "dataset": "d", "weights": "student", "task": "t", "metrics": {"acc1": 0.5}}])
        other.incident("test", f"step {number}")
    step(1)
    try:
        with fill.open("wb", buffering=0) as file:
            while True: file.write(bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    for number in range(2, 150): step(number)
    fill.unlink()
    step(150)
    subprocess.run(["mount", "-o", "remount,ro", run], check=True)
    for number in range(151, 160): step(number)
    subprocess.run(["mount", "-o", "remount,rw", run], check=True)
    step(160)
other.close()
write_verdict(run, 0, 160, 0, "done")
for name in ("metrics", "sample_ids", "eval"):
    from amclip_ds.jsonl import read_lines
    steps = [row["step"] for row in read_lines(run / f"{name}.jsonl")]
    assert steps == list(range(1, 161)), (name, steps)
held = [row for row in read_lines(run / "incidents.jsonl") if row["kind"] == "record_held"]
assert {row["rank"] for row in held} == {0, 1} and all("nothing is lost" in row["action"] for row in held), held
assert len([row for row in read_lines(run / "incidents.jsonl") if row["kind"] == "test"]) == 160
from tests.unit.test_backlog import events_of
assert events_of(run / "tensorboard") == list(range(1, 161))
assert json.loads((run / "exit.json").read_text())["code"] == 0
print("all there")
"""


def test_a_full_disk_and_a_read_only_one_lose_nothing(tmp_path: Path) -> None:
    """A real file system of 256 kB."""
    program = tmp_path / "program.py"
    program.write_text(SMALL_DISK)
    run = tmp_path / "run"
    run.mkdir()
    argv = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=512k none "$0" && exec "$@"', str(run)]
    if not shutil.which("unshare") or subprocess.run([*argv, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [*argv, sys.executable, program, run],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("all there"), done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("amclip: ")]
    assert sum("No space left on device" in line for line in said) <= 4, said  # 2 pens, the run's and TensorBoard's
    assert any("Read-only file system" in line for line in said) and "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="chattr needs root")
def test_a_file_that_may_not_be_written(tmp_path: Path) -> None:
    """Not permitted, even to root: the append-only file of a careful administrator, the other way round."""
    (tmp_path / "metrics.jsonl").touch()
    if subprocess.run(["chattr", "+i", tmp_path / "metrics.jsonl"], capture_output=True).returncode:
        pytest.skip("no immutable files here")
    reported = Recorder()
    held = Backlog(lambda *what: reported.append(what))
    held.append(tmp_path / "metrics.jsonl", rows(1)[0])
    subprocess.run(["chattr", "-i", tmp_path / "metrics.jsonl"], check=True)
    held.close()
    assert "not permitted" in reported[0][0] and json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1}
    assert stat.S_ISREG((tmp_path / "metrics.jsonl").stat().st_mode)
