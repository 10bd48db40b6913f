"""What a run writes: rows, rows set aside on a resume, a torn last line, the verdict."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from amclip_ds.errors import AmclipError, LocalRunStopped, NotRead, RunStopped
from amclip_ds.files import write_atomically
from amclip_ds.jsonl import append_line, read_lines
from amclip_ds.record import LogConfig, Record, read_verdict, run_id, supersede
from amclip_ds.record.timeline import Timeline
from amclip_ds.run_files import EVENT, TIMELINE
from amclip_ds.run_folder import next_attempt, write_verdict_at_end

ROW = {
    "step": 1,
    "updates": 1,
    "epoch": 0,
    "attempt": 0,
    "samples_seen": 64,
    "loss": 1 / 3,
    "loss_contrastive": 1.0,
    "loss_o2o": 1.0,
    "loss_o2e": 1.0,
    "lr": 1e-3,
    "momentum": 0.99,
    "logit_scale": 14.3,
    "grad_norm": 1.0,
    "step_applied": True,
    "samples_per_s": 10.0,
    "data_wait_s": 0.1,
    "step_s": 1.0,
    "kept_tokens": 100,
}


def record(folder: Path, rank: int = 0, **options: int) -> Record:
    return Record(
        folder,
        LogConfig(every_steps=10),
        rank=rank,
        world_size=2,
        attempt=3,
        total_steps=25,
        samples_per_epoch=1000,
        **options,
    )


def test_metrics_keep_full_precision_and_the_line_is_greppable(tmp_path: Path) -> None:
    with record(tmp_path) as pen:
        pen.metrics(ROW)
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 1 / 3
    log = (tmp_path / "out.log").read_text()
    for word in ("Train Epoch: 0", "Data (t): 0.100", "Batch (t): 1.000", "LR: 0.001", "Logit Scale: 14.300", "Loss: "):
        assert word in log
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_skipped_step_stays_strict_json(tmp_path: Path) -> None:
    append_line(tmp_path / "metrics.jsonl", ROW | {"loss": float("nan"), "grad_norm": float("inf")})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is row["grad_norm"] is None and row["lr"] == 1e-3


def test_only_rank_0_writes_but_any_rank_may_report_an_incident(tmp_path: Path) -> None:
    with record(tmp_path, rank=1) as pen:
        pen.metrics(ROW)
        pen.say("nothing")
        pen.incidents([{"kind": "no caption", "shard": "a.tar", "key": "7", "cause": "no .txt member"}])
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "out.log").exists()
    [row] = read_lines(tmp_path / "incidents.jsonl")
    assert set(row) == {"time", "attempt", "step", "rank", "kind", "shard", "key", "cause", "action"}
    assert (row["rank"], row["attempt"], row["shard"]) == (1, 3, "a.tar")


def test_due_steps_are_the_first_the_last_and_every_tenth(tmp_path: Path) -> None:
    with record(tmp_path) as pen:
        assert [step for step in range(1, 26) if pen.is_due(step)] == [1, 10, 20, 25]


def test_rows_after_the_checkpoint_are_set_aside(tmp_path: Path) -> None:
    for step in range(1, 6):
        append_line(tmp_path / "metrics.jsonl", {"step": step})
    supersede(tmp_path, 3)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_lines(tmp_path / "metrics.superseded.jsonl")] == [4, 5]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    append_line(tmp_path / "metrics.jsonl", {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "exit.json"
    write_atomically(target, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(OSError):
        supersede(tmp_path, 1)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not list(tmp_path.glob(".*.partial")), "what is left of the disk is not taken by what was not finished"


def test_the_verdict_of_each_ending(tmp_path: Path) -> None:
    class At:
        step = 7

    with write_verdict_at_end(tmp_path, 2, At(), is_main=True):
        pass
    assert json.loads((tmp_path / "exit.json").read_text()) == {"code": 0, "step": 7, "attempt": 2, "reason": "done"}
    with pytest.raises(RunStopped), write_verdict_at_end(tmp_path, 2, At(), is_main=True):
        raise RunStopped("three losses were not finite")
    assert json.loads((tmp_path / "exit.json").read_text())["code"] == 3
    (tmp_path / "exit.json").unlink()
    with pytest.raises(ZeroDivisionError), write_verdict_at_end(tmp_path, 2, At(), is_main=True):
        raise ZeroDivisionError
    assert not (tmp_path / "exit.json").exists(), "a crash leaves no verdict"


def test_the_first_error_of_a_rank_is_the_verdict(tmp_path: Path) -> None:
    """One that a rank meets alone is left by that rank; rank 0 may then fail of its absence."""
    state = SimpleNamespace(step=7)

    def end(error: AmclipError, is_main: bool, attempt: int = 2) -> str:
        with pytest.raises(AmclipError), write_verdict_at_end(tmp_path, attempt, state, is_main):
            raise error
        found = read_verdict(tmp_path)
        return f"{found['code']} {found['reason']}" if found else ""

    assert end(RunStopped("agreed"), is_main=False) == "", "rank 0 leaves it for all"
    assert end(LocalRunStopped("3.tar changed"), is_main=False) == "3 3.tar changed"
    assert end(AmclipError("no answer"), is_main=True) == end(NotRead("x"), is_main=False) == "3 3.tar changed"
    assert [row["event"] for row in read_lines(tmp_path / "timeline.jsonl")] == ["end"]
    assert end(AmclipError("no answer"), is_main=True, attempt=3) == "1 no answer", "over a stranger's"


def test_attempts_count_from_0(tmp_path: Path) -> None:
    assert [next_attempt(tmp_path) for _ in range(3)] == [0, 1, 2]


def test_an_attempt_keeps_its_number_though_rows_are_lost(tmp_path: Path) -> None:
    assert [next_attempt(tmp_path) for _ in range(2)] == [0, 1]
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(b"\0\0[torn\n")
    assert next_attempt(tmp_path) == 3  # the torn one was a start too
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 7}\n{"attempt": "8"}\n')
    assert next_attempt(tmp_path) == 8


def test_a_run_s_id_is_its_own_and_stays(tmp_path: Path) -> None:
    """Two folders of one name are two runs; an attempt, or a folder that is renamed, is the same one."""
    first, second = tmp_path / "a" / "clip", tmp_path / "b" / "clip"
    for folder in (first, second):
        folder.mkdir(parents=True)
    ids = run_id(first), run_id(second)
    assert ids[0] != ids[1] and ids[0].startswith("clip-") and run_id(first) == ids[0]
    first.rename(tmp_path / "renamed")
    assert run_id(tmp_path / "renamed") == ids[0]


def test_an_evaluations_classes_are_beside_its_numbers(tmp_path: Path) -> None:
    """eval.jsonl stays small; a resume sets the rows of both aside."""
    row = {
        "step": 20,
        "weights": "student",
        "dataset": "pets",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5},
        "per_class": {"cat": [1, 2]},
        "confusion_matrix": [[1]],
    }
    with record(tmp_path) as pen:
        pen.evaluation([row])
    [number], [classes] = read_lines(tmp_path / "eval.jsonl"), read_lines(tmp_path / "eval_classes.jsonl")
    assert number["metrics"] == {"acc1": 0.5} and not {"per_class", "confusion_matrix"} & set(number)
    assert classes["per_class"] == {"cat": [1, 2]} and (classes["step"], classes["dataset"]) == (20, "pets")
    supersede(tmp_path, 10)
    assert not read_lines(tmp_path / "eval_classes.jsonl") and not read_lines(tmp_path / "eval.jsonl")


def test_the_start_is_reported_once_by_part(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, attempt=0, is_main=False)  # other ranks write nothing, and count alike
    timeline.start()
    with timeline.during("build"):
        time.sleep(0.1)
    line = timeline.first_step()
    assert line is not None and "imports and meeting " in line and "build " in line
    assert timeline.first_step() is None


def test_a_timeline_row_that_the_disk_does_not_take_ends_nothing(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, attempt=2, is_main=True)
    timeline.start(world_size=4)
    timeline.step = 7
    with timeline.during("save"):
        time.sleep(0.02)
    with timeline.during("evaluate"):
        pass
    start, save = read_lines(tmp_path / TIMELINE, EVENT)
    assert start["world_size"] == 4 and start["before_s"] > 0
    assert (save["event"], save["step"], save["attempt"]) == ("save", 7, 2) and 0.02 <= save["seconds"] < 5
    Timeline(tmp_path / "gone", attempt=0, is_main=True).add("end")
    Timeline(tmp_path, attempt=0, is_main=False).add("end")
    assert len(read_lines(tmp_path / TIMELINE)) == 2
