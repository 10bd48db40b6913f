"""Beside train.sbatch: a sweep makes one table, an evaluator scores each checkpoint once, shards go in slices."""

import json
from pathlib import Path

import pytest

from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.nightly


def test_a_sweep_of_four_two_at_a_time_makes_one_table(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("grid:\n  optim.lr: [1e-3, 2e-3]\n  mask.keep_ratio: [0.5, 0.25]\n")
    words = [str(runs.SLURM / "sweep.sbatch"), "sweep.yaml", "out", *runs.tiny(synthetic, "unused", "run.steps=4")]
    words = [word for word in words if not word.startswith("run.out=")]
    job_id = cluster.submit("--array=0-3%2", *words, cwd=tmp_path, env=runs.base_environment())
    at_once: set[int] = set()

    def over() -> bool:
        states = cluster.client("squeue", "-h", "-r", "-j", str(job_id), "-t", "RUNNING", "-o", "%i", check=False)
        at_once.add(len(states.split()))
        return (tmp_path / "out" / "sweep.txt").exists()

    cluster.poll(over, "the table", 900, f"{job_id}_3")
    assert max(at_once) <= 2
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["code"] for row in rows] == [0] * 4 and [row["step"] for row in rows] == [4] * 4
    assert len({row["loss"] for row in rows}) == 4
    assert all(any(name.endswith("acc1") for name in row) for row in rows)
    table = (tmp_path / "out" / "sweep.txt").read_text()
    assert len(table.splitlines()) == 5 and "optim.lr" in table


def test_a_comparison_is_an_array_with_one_table(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    words = [word for word in runs.tiny(synthetic, "unused") if not word.startswith("run.")][1:]
    words = ["clip-tiny", "random2x-tiny", *words, "--seeds", "2", "--budget", "steps=4", "--out", "out"]
    job_id = cluster.submit(
        "--array=0-3%2", str(runs.SLURM / "compare.sbatch"), *words, cwd=tmp_path, env=runs.base_environment()
    )
    cluster.poll((tmp_path / "out" / "compare.png").exists, "the table", 900, f"{job_id}_3")
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["code"] for row in found["rows"]] == [0] * 4
    assert [(row["recipe"], row["seeds"]) for row in found["summary"]] == [("clip-tiny", 2), ("random2x-tiny", 2)]


def test_the_evaluator_scores_every_checkpoint_once(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    words = runs.tiny(synthetic, "run", "eval.data=null")
    job_id = runs.submit_train(cluster, tmp_path, words, *runs.FOUR_TASKS)
    watcher = cluster.submit(
        f"--dependency=after:{job_id}",
        "--oversubscribe",
        str(runs.SLURM / "eval.sbatch"),
        "run",
        str(synthetic),
        "--every-s",
        "1",
        cwd=tmp_path,
        env=runs.base_environment(),
    )
    cluster.wait(job_id, "COMPLETED")
    cluster.wait(watcher, "COMPLETED")
    scored = [(row["step"], row["weights"]) for row in runs.rows(tmp_path / "run", "eval")]
    assert sorted(scored) == [(step, weights) for step in (10, 20, 30) for weights in ("student", "teacher")]


def test_shards_are_checked_in_slices_and_indexed(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    job_id = cluster.submit(
        "--array=0-1",
        "--cpus-per-task=2",
        str(runs.SLURM / "data.sbatch"),
        str(synthetic / "train"),
        "out",
        cwd=tmp_path,
        env=runs.base_environment(),
    )
    for task in (0, 1):
        cluster.wait(f"{job_id}_{task}", "COMPLETED")
    joined = json.loads((tmp_path / "out" / "check.json").read_text())
    assert joined["ok"] and joined["read"] == joined["expected"] == 600 and len(joined["shards"]) == 6
    assert (tmp_path / "out" / "index" / "meta.json").exists()


def test_amclip_submit_submits_a_chain(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """Two jobs, one after the other; the second finds the run done and does nothing."""
    words = runs.tiny(synthetic, tmp_path / "run", "run.steps=4", "eval.data=null")
    flags = ("--nodes", "2", "--tasks-per-node", "2", "--chain", "2", "--json", "plan.json")
    done = runs.amclip("submit", *words, *flags, cwd=tmp_path, env=cluster.env)
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "plan.json").read_text())["jobs"]
    assert done.stdout.splitlines()[-1] == f"{first} {second}"
    for job_id in (first, second):
        cluster.wait(job_id, "COMPLETED")
    assert "resumes from step 4" in cluster.job_log(second)
    assert "note: this node has GPUs (gpu:2) and the job asked for none" in cluster.job_log(first)
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert runs.verdict(tmp_path / "run")["code"] == 0
