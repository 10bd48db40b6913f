"""What goes wrong ends soon, is named in the job's log, and leaves nothing behind."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.slurm import runs
from tests.slurm.cluster import Cluster, read


def kill_rank(cluster: Cluster, job_id: int, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to the trainer process of one rank."""
    marker = f"SLURM_JOB_ID={job_id}\0"
    for pid in cluster.tasks(marker):
        environ, command = (read(f"/proc/{pid}/{name}").split(b"\0") for name in ("environ", "cmdline"))
        if f"SLURM_PROCID={rank}".encode() in environ and b"SLURM_STEP_ID=0" in environ and b"train" in command:
            os.kill(pid, number)
            return
    raise AssertionError(f"rank {rank} of job {job_id} is not there")


def assert_no_orphans(cluster: Cluster, job_id: int) -> None:
    left = lambda: not cluster.tasks(f"SLURM_JOB_ID={job_id}\0")  # noqa: E731
    cluster.poll(left, f"the processes of job {job_id} to be gone", 20)


def test_a_rank_that_crashes_ends_the_job(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    job_id = runs.submit_train(cluster, tmp_path, runs.tiny(synthetic, "run", "run.steps=5000"), *runs.FOUR_TASKS)
    cluster.wait_log(job_id, r"Step: 5/")
    kill_rank(cluster, job_id, 3)
    start = time.monotonic()
    cluster.wait(job_id, "FAILED", timeout_s=600)
    seconds, load = time.monotonic() - start, os.getloadavg()[0]
    print(f"FAILED {seconds:.1f} s after the kill, load {load:.1f}")
    assert seconds < 30 * max(1.0, load / (os.cpu_count() or 1)), "30 s, were nobody else computing here"
    log = cluster.job_log(job_id)
    assert "node2: task 3: Killed" in log and "no verdict in run/exit.json: crash" in log
    assert cluster.job(job_id)["Restarts"] == "0"
    assert_no_orphans(cluster, job_id)


@pytest.mark.nightly
def test_a_hang_is_reported_with_the_stacks_of_both_nodes(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """One watchdog a node; the first of them joins the reports, blames the rank that has stopped, and ends the job."""
    words = runs.tiny(synthetic, "run", "run.steps=5000", "watchdog.step_timeout_s=10")
    job_id = runs.submit_train(cluster, tmp_path, words, *runs.FOUR_TASKS)
    cluster.wait_log(job_id, r"Step: 5/")
    kill_rank(cluster, job_id, 3, signal.SIGSTOP)
    cluster.wait(job_id, "FAILED", timeout_s=200)
    run, log = tmp_path / "run", cluster.job_log(job_id)
    [row] = [row for row in read_lines(run / "incidents.jsonl") if row["kind"] == "hang"]
    assert row["rank"] == 3 and "rank 3 on node2" in row["cause"] and "gave no report" not in row["cause"]
    reports = sorted((run / "hangs").glob("*.txt"))
    assert [report.read_text().count("=== rank ") for report in reports] == [2, 2]
    assert sum(f"=== rank {rank} on node{1 + rank // 2}" in log for rank in range(4)) == 4, (
        "all of them in the job's log"
    )
    assert log.count("train.py") >= 4
    assert_no_orphans(cluster, job_id)


@pytest.mark.nightly
def test_a_crash_loop_stops(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """Asked to retry crashes, the job gives up after two attempts that brought no new checkpoint."""
    words = runs.tiny(synthetic, "run", "run.steps=5000", "checkpoint.every_steps=4000")
    env = {"AMCLIP_RETRY_CRASHES": "1", "AMCLIP_MAX_STALLS": "2"}
    job_id = runs.submit_train(cluster, tmp_path, words, *runs.FOUR_TASKS, env=env)
    for attempt in (1, 2):
        at_work = functools.partial(lambda count: cluster.job_log(job_id).count(" Step: 2/") == count, attempt)
        cluster.poll(at_work, f"the second step of attempt {attempt}", 900, job_id)
        kill_rank(cluster, job_id, 1)
        if attempt == 1:
            cluster.wait_requeued(job_id)
    cluster.wait(job_id, "FAILED", timeout_s=200)
    assert "no new checkpoint in 2 attempts (AMCLIP_MAX_STALLS)" in cluster.job_log(job_id)
    assert cluster.job(job_id)["Restarts"] == "1"
    assert_no_orphans(cluster, job_id)


def test_mistakes_are_one_line_and_never_requeued(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """Each with its own exit code, and before any rank was started."""
    locked = tmp_path / "locked"
    locked.write_text("a file where the run's folder should be")
    few = runs.tiny(synthetic, "run", f"data.train={synthetic}/train/{sorted(os.listdir(synthetic / 'train'))[0]}")
    cases = {
        "missing venv": (
            runs.tiny(synthetic, "run"),
            {"AMCLIP_PYTHON": "", "AMCLIP_VENV": "/no/venv"},
            "no Python at /no/venv/bin/python",
        ),
        "unknown recipe": (["aclip-tinny", *runs.tiny(synthetic, "run")[1:]], {}, "'aclip-tinny' is not known"),
        "unknown key": (runs.tiny(synthetic, "run", "optim.lrr=1"), {}, "unknown key; did you mean optim.lr?"),
        "batch": (runs.tiny(synthetic, "run", "batch.global_size=25"), {}, "batch.global_size: 25"),
        "more nodes than shards": (few, {}, "data.train: 1 shard(s) for 2 nodes"),
        "unwritable": (runs.tiny(synthetic, locked / "run"), {}, f"run.out: {locked}/run cannot be written"),
        "no checkout": (runs.tiny(synthetic, "run"), {"AMCLIP_HOME": "/no/checkout"}, "no checkout at /no/checkout"),
    }
    jobs = {
        name: runs.submit_train(
            cluster, tmp_path, words, *runs.FOUR_TASKS, "--oversubscribe", f"--output={name}.out", env=env
        )
        for name, (words, env, _) in cases.items()
    }
    for name, job_id in jobs.items():
        cluster.wait(job_id, "FAILED", timeout_s=2000)
        job, log = cluster.job(job_id), cluster.job_log(job_id)
        lines = [line for line in log.splitlines() if line.strip()]
        assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0"), (name, job, log)
        assert len(lines) == 1 and cases[name][2] in lines[0], (name, log)


@pytest.mark.nightly
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """Its ranks save at TERM and say 75, but nobody asked for a requeue."""
    job_id = runs.submit_train(cluster, tmp_path, runs.tiny(synthetic, "run", "run.steps=5000"), *runs.FOUR_TASKS)
    cluster.wait_log(job_id, r"Step: 5/")
    cluster.client("scancel", str(job_id))
    cluster.wait(job_id, "CANCELLED", timeout_s=200)
    time.sleep(2)
    assert cluster.state(job_id) == "CANCELLED" and cluster.job(job_id)["Restarts"] == "0"
    assert_no_orphans(cluster, job_id)
