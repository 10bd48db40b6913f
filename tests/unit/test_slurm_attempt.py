"""What train.sbatch decides from how an attempt ended."""

import errno
import json
import os
from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.preconditions import resumes
from amclip_ds.record import read_verdict
from amclip_ds.slurm_attempt import (
    Limits,
    Newest,
    count_stalls,
    decide,
    largest_that_divides,
    main,
    newest_checkpoint,
    node_range,
    resume_mode,
)
from tests.unit.checkpoint.test_forged import fail_at_open
from tests.unit.data.shards import write_shards

LIMITS = Limits(max_restarts=5, max_stalls=3)
RETRY = Limits(max_restarts=5, max_stalls=3, retry_crashes=True)


def verdict(code: int) -> dict:
    return {"code": code, "step": 7, "attempt": 0, "reason": "because"}


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_finished_mistaken_or_stopped_run_is_never_requeued(code: int) -> None:
    decision = decide(verdict(code), 0, 0, RETRY, status=0)
    assert not decision.requeue and decision.code == code and "because" in decision.reason


def test_a_preempted_run_is_requeued_until_a_limit() -> None:
    assert decide(verdict(75), 0, 0, LIMITS, status=143).requeue
    assert decide(verdict(75), 4, 2, LIMITS, status=0).requeue
    for restarts, stalls, named in ((5, 0, "AMCLIP_MAX_RESTARTS"), (0, 3, "AMCLIP_MAX_STALLS")):
        decision = decide(verdict(75), restarts, stalls, LIMITS, status=0)
        assert not decision.requeue and decision.code == 75 and named in decision.reason


def test_a_crash_ends_the_job_unless_asked_and_a_crash_loop_always_ends() -> None:
    assert not decide(None, 0, 0, LIMITS, status=1).requeue
    assert decide(None, 0, 1, RETRY, status=1).requeue
    looping = decide(None, 2, 3, RETRY, status=1)
    assert not looping.requeue and looping.code == 1 and "3 attempts" in looping.reason
    assert decide(None, 0, 0, LIMITS, status=143).code == 1, "a crash is never taken for a preemption"


def test_a_fault_is_a_crash_whichever_rank_met_it() -> None:
    """Rank 0 leaves a verdict of it, another rank none: the same trouble of a disk ends or requeues the job alike."""
    for written in (None, verdict(1)):
        assert not decide(written, 0, 0, LIMITS, status=1).requeue
        assert decide(written, 0, 1, RETRY, status=143).requeue
        looping = decide(written, 2, 3, RETRY, status=143)
        assert not looping.requeue and looping.code == 1 and "3 attempts" in looping.reason
    assert "because" in decide(verdict(1), 0, 0, LIMITS, status=1).reason


def test_ranks_that_all_left_before_the_first_step_are_requeued_within_the_limit() -> None:
    """A crash has a status of its own, as has what it takes down with it. A rank that others left may say code 1."""
    for written in (None, verdict(1)):
        assert decide(written, 0, 0, LIMITS, status=0).requeue
        often = decide(written, 2, 3, LIMITS, status=0)
        assert not often.requeue and often.code == 75 and "3 attempts" in often.reason


def began(*steps: int) -> list[dict]:
    return [{"step": step} for step in steps]


def test_stalls_are_the_last_attempts_that_began_where_the_run_still_is() -> None:
    assert count_stalls(began(-1, 10, 20), Newest(30)) == 0
    assert count_stalls(began(-1, 10, 30), Newest(30)) == 1
    assert count_stalls(began(-1, -1, -1), Newest()) == 3
    assert count_stalls([], Newest()) == 0
    same = [{"step": 30, "checkpoint_time": 5}]
    assert (count_stalls(same, Newest(30, 5)), count_stalls(same, Newest(30, 6))) == (1, 0), "another run's step 30"


def test_the_newest_step_ignores_what_is_not_committed(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == Newest()
    for name in ("step_00000010", "step_00000020", ".tmp-step_00000030", "step_00000025.del", "step_²"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == Newest(20)
    manifest = tmp_path / "checkpoints" / "step_00000020" / "manifest.json"
    manifest.write_text("{}")
    assert newest_checkpoint(tmp_path) == Newest(20, manifest.stat().st_mtime_ns)


def test_a_torn_or_foreign_exit_file_is_no_verdict(tmp_path: Path) -> None:
    assert read_verdict(tmp_path) is None
    for text in ("", '{"code": 7', "[]", '{"code": "75"}'):
        (tmp_path / "exit.json").write_text(text)
        assert read_verdict(tmp_path) is None


def test_resume_never_holds_for_the_start_alone() -> None:
    assert resume_mode("never", [], Newest(40)) == "never"
    assert resume_mode("never", began(40), Newest(40)) == "never", "no checkpoint of this job yet"
    assert resume_mode("never", began(40), Newest(50)) == "auto"


def test_a_restart_that_has_saved_nothing_begins_where_the_job_did() -> None:
    """What a start from another run's checkpoint set aside leaves an older one newest, or none."""
    mine = [{"step": 300, "checkpoint_time": 9, "resume": "OTHER"}]
    for newest in (Newest(), Newest(200, 5)):
        assert resume_mode("OTHER", mine, newest) == "OTHER"
    assert resume_mode("OTHER", mine, Newest(20, 10)) == "auto"


def saved_step_40(folder: Path) -> Path:
    """Shards in folder/data, and the manifest of a checkpoint of step 40 in folder/run."""
    write_shards(folder / "data", (20,))
    manifest = folder / "run" / "checkpoints" / "step_00000040" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    return manifest


def test_the_jobs_of_a_chain_continue_each_others_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is given --resume never or PATH, which hold for the first of them alone."""
    old, own = Newest(300, 9), Newest(20, 11)
    for wanted in ("never", "OTHER"):
        assert resume_mode(wanted, [], old, chain_since=10) == wanted
        assert resume_mode(wanted, [], own) == wanted, "no chain"
        assert resume_mode(wanted, [], own, chain_since=10) == "auto"
        continued = [{"step": 20, "checkpoint_time": 11, "resume": "auto"}]
        assert resume_mode(wanted, continued, own, chain_since=12) == "auto", "requeued, which made it younger"

    manifest = saved_step_40(tmp_path)
    written = int(manifest.stat().st_mtime)
    recipe = ["--", "aclip-tiny", f"data.train={tmp_path}/data", f"run.out={tmp_path}/run", "batch.global_size=8"]
    for job, (submitted, mode) in enumerate(((written + 60, "never"), (written - 60, "auto"))):
        words = ["begin", "--job", str(job), "--nodes", "1", "--tasks", "1", "--chain", "--submitted", str(submitted)]
        assert main([*words, *recipe, "--resume=never"]) == 0
        assert capsys.readouterr().out.splitlines()[2] == mode


@pytest.mark.parametrize("ending", ["nothing", "STOP"])
def test_a_job_of_a_chain_that_was_requeued_before_it_began_knows_the_chains_past(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a lost node: squeue then has the time of the requeue, after what the jobs before have saved, or a STOP."""
    run, manifest = tmp_path / "run", saved_step_40(tmp_path)
    written = int(manifest.stat().st_mtime)
    if ending == "STOP":
        (run / "exit.json").write_text(json.dumps(verdict(75) | {"reason": "a STOP file; stopped after step 40"}))
    recipe = ["--", "aclip-tiny", f"data.train={tmp_path}/data", f"run.out={run}", "batch.global_size=8"]
    cases = [  # the words for the chain, the restart, whether the past is the chain's
        (["--submitted", str(written - 60)], 1, True),
        (["--submitted", str(written + 60)], 1, False),
        (["--queued", str(written + 60)], 1, True),
        (["--queued", str(written + 60)], 0, False),
    ]
    for job, (words, restart, is_chains) in enumerate(cases):
        asked = ["begin", "--job", str(job), "--restart", str(restart), "--nodes", "1", "--tasks", "1", "--chain"]
        code = main([*asked, *words, *recipe, "--resume=never"])
        answer = capsys.readouterr().out.splitlines()
        if ending == "STOP" and is_chains:
            assert code == 75 and answer == ["exit 75"]
        else:
            assert code == 0 and answer[2] == ("auto" if is_chains else "never")
    again = ["begin", "--job", "3", "--restart", "1", "--nodes", "1", "--tasks", "1", "--chain"]
    assert main([*again, "--queued", str(written + 90), *recipe, "--resume=never"]) == 0, "it had begun"
    assert capsys.readouterr().out.splitlines()[2] == "never"


def test_a_restart_resumes_from_its_own_checkpoint_of_the_old_runs_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started with --resume never where step 40 was the newest, stopped when its own step 40 was."""
    run, manifest = tmp_path / "run", saved_step_40(tmp_path)
    words = ["begin", "--job", "9", "--nodes", "1", "--tasks", "2", "--", "aclip-tiny", f"data.train={tmp_path}/data"]
    assert main([*words, f"run.out={run}", "batch.global_size=8", "--resume=never"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2] == "never" and "; starts fresh; " in shown.err
    assert begin(run, tmp_path / "data", 1, 1, capsys, "--resume=never")[2] == "never", "it saved nothing"
    manifest.write_text("{ }")
    os.utime(manifest, ns=(manifest.stat().st_mtime_ns + 1,) * 2)
    assert begin(run, tmp_path / "data", 1, 2, capsys, "--resume=never")[2] == "auto"


def test_an_old_verdict_is_not_taken_for_this_attempts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The attempt before wrote code 0; this one died without a word: a crash, not a success."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "exit.json").write_text(json.dumps(verdict(0)))
    written = os.stat(tmp_path / "exit.json").st_mtime_ns
    row = {"job": "9", "step": -1, "verdict_time": written}
    (tmp_path / "slurm" / "attempts.jsonl").write_text(json.dumps(row) + "\n")
    words = ["end", "--job", "9", "--run", str(tmp_path), "--status", "143"]
    assert main(words) == 0 and capsys.readouterr().out == "exit 1\n"
    (tmp_path / "exit.json").write_text(json.dumps(verdict(75)))
    os.utime(tmp_path / "exit.json", ns=(written + 1, written + 1))
    assert main(words) == 0 and capsys.readouterr().out.startswith("requeue stopped at step 7")


def test_a_stop_file_is_a_persons_wish_and_not_requeued() -> None:
    asked = verdict(75) | {"reason": "a STOP file; stopped after step 7"}
    decision = decide(asked, 0, 0, RETRY, status=0)
    assert not decision.requeue and decision.code == 75 and "submit again" in decision.reason


@pytest.mark.parametrize("code", [2, 3])
def test_ranks_that_another_trainer_keeps_out_are_no_crash(code: int) -> None:
    """Refused the folder, or having lost it, they leave no verdict: it is the other's, as are the new checkpoints."""
    decision = decide(None, 0, 0, RETRY, status=code)
    assert not decision.requeue and decision.code == code


def test_a_file_systems_bad_moment_does_not_end_what_is_to_be_requeued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = tmp_path / "slurm" / "attempts.jsonl"
    attempts.parent.mkdir()
    attempts.write_text(json.dumps({"job": "9", "step": -1, "verdict_time": 0}) + "\n")
    (tmp_path / "exit.json").write_text(json.dumps(verdict(75)))
    fail_at_open(monkeypatch, attempts, errno.ESHUTDOWN, 2)
    assert main(["end", "--job", "9", "--run", str(tmp_path), "--status", "0"]) == 0
    assert capsys.readouterr().out.startswith("requeue stopped at step 7")


def test_the_accepted_nodes_go_from_the_fewest_to_the_most() -> None:
    assert (node_range(1, 2), node_range(2, 8)) == ("1-2", "2-8")
    assert (node_range(1, 1), node_range(9, 4)) == ("", ""), "nothing to relax"


def test_a_restart_uses_as_many_nodes_as_the_batch_divides_by() -> None:
    assert largest_that_divides(4096, 3, 8) == 2
    assert largest_that_divides(24, 2, 2) == 2
    assert largest_that_divides(7, 3, 2) == 0


def begin(run: Path, data: Path, nodes: int, restart: int, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    words = [
        "begin",
        "--job",
        "9",
        "--restart",
        str(restart),
        "--nodes",
        str(nodes),
        "--tasks",
        str(nodes * 2),
        "--tasks-per-node",
        "2",
        "--",
        "aclip-tiny",
        f"data.train={data}",
        f"run.out={run}",
        "batch.global_size=8",
        *more,
    ]
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_the_most_nodes_are_remembered_over_a_small_attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 1 of 2 nodes Slurm shows 1 as the most: a job that believed it would never grow back."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        (data / f"{number}.tar").write_bytes(bytes(10240))  # a tar of nothing
    run = tmp_path / "run"
    assert begin(run, data, 2, 0, capsys)[3:] == ["2", "1-2"]
    assert begin(run, data, 1, 1, capsys)[3:] == ["1", "1-2"]
    assert begin(run, data, 3, 2, capsys)[3:] == ["2", "1-3"], "8 samples, 6 tasks"


def test_a_wrong_evaluation_set_ends_the_job_before_its_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that has begun it costs the evaluations alone, as in training."""
    write_shards(tmp_path / "data", (4,))
    (tmp_path / "set").mkdir()
    run = tmp_path / "run"
    words = [
        "begin",
        "--job",
        "9",
        "--nodes",
        "1",
        "--tasks",
        "1",
        "--",
        "aclip-tiny",
        f"data.train={tmp_path}/data",
        f"run.out={run}",
        f"eval.data={tmp_path}/set",
    ]
    assert main(words) == 2 and f"eval.data: {tmp_path}/set" in capsys.readouterr().err
    assert not run.exists()
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert main(words) == 0, capsys.readouterr().err


def test_a_folder_of_another_name_is_no_checkpoint_to_continue_from(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name, is_one in (("step_5", False), ("step_00000005.partial", False), ("step_00000005", True)):
        (tmp_path / "checkpoints" / name).mkdir()
        assert resumes(config.load("aclip-tiny", [f"run.out={tmp_path}"])) == is_one, name


def test_rows_that_are_no_attempts_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "data", (20,))
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "attempts.jsonl").write_text('{"job": 9}\n{"step": 3}\nno row\n[]\n')
    assert begin(run, tmp_path / "data", 1, 0, capsys)[2] == "auto"
    assert main(["end", "--job", "9", "--run", str(run), "--status", "1"]) == 0
    assert capsys.readouterr().out == "exit 1\n", "a crash: it left no verdict"


@pytest.mark.parametrize("code", [2, 3, 75])
def test_a_chain_heeds_the_ending_of_its_own_jobs_alone(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was there as the chain was submitted is what a person has repaired since."""
    write_shards(tmp_path / "data", (20,))
    run = tmp_path / "run"
    begin(run, tmp_path / "data", 1, 0, capsys)
    reason = {"reason": "a STOP file; stopped after step 7"} if code == 75 else {}
    (run / "exit.json").write_text(json.dumps(verdict(code) | reason))
    written = int((run / "exit.json").stat().st_mtime)
    recipe = ["--", "aclip-tiny", f"data.train={tmp_path}/data", f"run.out={run}", "batch.global_size=8"]
    for job, submitted in enumerate((str(written + 60), str(written - 60), "")):  # empty: squeue does not answer
        words = ["begin", "--job", str(job), "--nodes", "1", "--tasks", "1", "--chain", "--submitted", submitted]
        assert main([*words, *recipe]) == (0 if job == 0 else code)
        assert (capsys.readouterr().out == f"exit {code}\n") == (job > 0)


def test_a_job_that_reached_a_limit_says_that_it_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train.sbatch requeues a begin that fails on a restart, but not this one."""
    write_shards(tmp_path / "data", (20,))
    for _ in range(3):
        begin(tmp_path / "run", tmp_path / "data", 1, 0, capsys)
    with pytest.raises(AssertionError):
        begin(tmp_path / "run", tmp_path / "data", 1, 1, capsys)
    captured = capsys.readouterr()
    assert captured.out == "exit 1\n" and "no new checkpoint in 3 attempts" in captured.err
