"""Stopped in mid-training, requeued under the same id, finished: bit for bit the undisturbed job's weights."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Finished

Disturb = Callable[[Cluster, int], object]


def interrupt(
    cluster: Cluster,
    data: Path,
    work: Path,
    disturb: Disturb,
    *flags: str,
    restarts: int = 1,
    more: tuple[str, ...] = (),
) -> int:
    """Submits the tiny run, disturbs it once it has trained a few steps, lets it restart and end. Returns the job."""
    job_id = runs.submit_train(cluster, work, runs.tiny(data, "run", *more), *(flags or runs.FOUR_TASKS))
    cluster.wait_log(job_id, r"Step: 5/")
    disturb(cluster, job_id)
    cluster.wait_requeued(job_id, restarts)
    cluster.wait(job_id, "COMPLETED")
    return job_id


def assert_equal_to_undisturbed(run: Path, undisturbed: Finished) -> None:
    assert runs.losses(run) == runs.losses(undisturbed.run)
    assert runs.final_weights(run) == runs.final_weights(undisturbed.run)


def assert_saved_and_requeued(cluster: Cluster, job_id: int, run: Path) -> None:
    log = cluster.job_log(job_id)
    assert cluster.job(job_id)["Restarts"] == "1"
    assert "code 75 in run/exit.json" in log and f"job {job_id}, restart 1" in log and "resumes from step" in log
    assert runs.verdict(run)["code"] == 0 and runs.verdict(run)["attempt"] == 1
    assert [row["restart"] for row in runs.rows(run, "slurm/attempts")] == [0, 1]


def test_usr1_to_the_batch_script(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    """Forwarded to the ranks once; a second arrival is no second stop."""

    def twice(cluster: Cluster, job_id: int) -> None:
        for _ in range(2):
            cluster.client("scancel", "--batch", "--signal=USR1", str(job_id), check=False)

    job_id = interrupt(cluster, synthetic, tmp_path, twice)
    assert_saved_and_requeued(cluster, job_id, tmp_path / "run")
    assert cluster.job_log(job_id).count("got USR1") == 1
    assert_equal_to_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.nightly
def test_usr1_to_the_step(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    job_id = interrupt(cluster, synthetic, tmp_path, lambda c, j: c.client("scancel", "--signal=USR1", f"{j}.0"))
    assert_saved_and_requeued(cluster, job_id, tmp_path / "run")
    assert_equal_to_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.nightly
def test_usr1_to_everything_at_once(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    job_id = interrupt(
        cluster, synthetic, tmp_path, lambda c, j: c.client("scancel", "--full", "--signal=USR1", str(j))
    )
    assert_saved_and_requeued(cluster, job_id, tmp_path / "run")
    assert_equal_to_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.nightly
def test_an_urgent_job_preempts(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    urgent: list[int] = []

    def preempt(cluster: Cluster, job_id: int) -> None:
        urgent.append(cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 2"))

    job_id = interrupt(cluster, synthetic, tmp_path, preempt)
    cluster.wait(urgent[0], "COMPLETED")
    assert_saved_and_requeued(cluster, job_id, tmp_path / "run")
    assert_equal_to_undisturbed(tmp_path / "run", undisturbed)


def after_a_checkpoint(run: Path, disturb: Disturb) -> Disturb:
    """Disturbs only once there is a checkpoint to come back to."""

    def wait_and_disturb(cluster: Cluster, job_id: int) -> None:
        cluster.poll(lambda: list((run / "checkpoints").glob("step_*")), "the first checkpoint", 900, job_id)
        disturb(cluster, job_id)

    return wait_and_disturb


BY_TASKS, BY_GPUS = runs.FOUR_TASKS, ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=2")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("flags", "lost"), [(BY_TASKS, "node2"), (BY_TASKS, "node1"), (BY_GPUS, "node2")], ids=["tasks", "batch", "gpus"]
)
def test_a_lost_node_shrinks_the_job_and_its_return_grows_it(
    cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished, flags: tuple[str, ...], lost: str
) -> None:
    """2 x 2, 1 x 2, 2 x 2: nobody speaks to Slurm about the job but to preempt it, not even to shorten its waits.

    Where the lost node is node1, the batch script is lost with it, and the keeper on the other node must act.
    """
    run = tmp_path / "run"
    job_id = runs.submit_train(cluster, tmp_path, runs.tiny(synthetic, "run"), *flags)
    cluster.poll(lambda: list((run / "checkpoints").glob("step_*")), "the first checkpoint", 900, job_id)
    cluster.lose(lost)
    cluster.wait_log(job_id, r"restart 1: 2 task\(s\) on 1 node")
    cluster.revive(lost, wait=False)
    cluster.poll(lambda: any(row["attempt"] == 1 for row in runs.rows(run)), "a step on one node", 900, job_id)
    cluster.client("scancel", "--batch", "--signal=USR1", str(job_id))
    cluster.wait(job_id, "COMPLETED", timeout_s=1500)
    assert [row["tasks"] for row in runs.rows(run, "slurm/attempts")] == [4, 2, 4], cluster.job_log(job_id)
    assert cluster.job(job_id)["Restarts"] == "2" and {row["attempt"] for row in runs.rows(run)} == {0, 1, 2}
    assert runs.rows(run, "sample_ids") == runs.rows(undisturbed.run, "sample_ids")
    assert runs.losses(run) == pytest.approx(runs.losses(undisturbed.run), rel=2e-2)


@pytest.mark.nightly
def test_with_a_minimum_of_nodes_the_job_waits_for_them(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """The twin: AMCLIP_MIN_NODES=2 asks nothing of Slurm, so that the restart pends until both nodes are there."""
    run, env = tmp_path / "run", {"AMCLIP_MIN_NODES": "2"}
    job_id = runs.submit_train(cluster, tmp_path, runs.tiny(synthetic, "run"), *BY_TASKS, env=env)
    cluster.poll(lambda: list((run / "checkpoints").glob("step_*")), "the first checkpoint", 900, job_id)
    cluster.lose("node2")
    cluster.wait(job_id, "PENDING")
    time.sleep(130)  # Slurm's own wait is 121 s
    assert cluster.state(job_id) == "PENDING" and cluster.job(job_id)["NumNodes"] in ("2", "2-2")


@pytest.mark.nightly
def test_a_node_goes_down_and_returns(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    def down_and_up(cluster: Cluster, job_id: int) -> None:
        cluster.node_down("node2")
        cluster.wait(job_id, "PENDING")
        cluster.node_up("node2")

    job_id = interrupt(cluster, synthetic, tmp_path, after_a_checkpoint(tmp_path / "run", down_and_up))
    assert "resumes from step" in cluster.job_log(job_id)
    assert_equal_to_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.nightly
def test_a_slurmd_is_killed(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    """The node is lost after some 25 s while its ranks live on: the run's owner file keeps the two attempts apart."""

    def kill_and_revive(cluster: Cluster, job_id: int) -> None:
        cluster.kill_slurmd("node2")
        cluster.wait(job_id, "PENDING")
        cluster.revive("node2", wait=False)

    more = ("run.steps=30",)
    job_id = interrupt(cluster, synthetic, tmp_path, after_a_checkpoint(tmp_path / "run", kill_and_revive), more=more)
    assert "restart 1" in cluster.job_log(job_id)
    assert_equal_to_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.nightly
def test_a_bad_day(cluster: Cluster, synthetic: Path, tmp_path: Path, undisturbed: Finished) -> None:
    """One job, disturbed in every attempt and each time differently: its weights are the undisturbed job's."""
    run = tmp_path / "run"

    def wait_for_attempt(number: int) -> None:
        def at_work() -> bool:
            return run.joinpath("metrics.jsonl").exists() and any(row["attempt"] == number for row in runs.rows(run))

        cluster.poll(at_work, f"a step of attempt {number}", 900, job_id)

    def preempt() -> None:
        urgent.append(cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 2"))

    def down_and_up() -> None:
        cluster.node_down("node2")
        cluster.wait(job_id, "PENDING")
        cluster.node_up("node2")

    def kill_and_revive() -> None:
        cluster.lose("node2")  # with ranks that train on, the few steps left would be done before it is missed
        cluster.wait(job_id, "PENDING")
        cluster.revive("node2", wait=False)

    urgent: list[int] = []
    job_id = runs.submit_train(cluster, tmp_path, runs.tiny(synthetic, "run"), *runs.FOUR_TASKS)
    disturbances: list[Callable[[], object]] = [
        lambda: cluster.client("scancel", "--batch", "--signal=USR1", str(job_id)),
        lambda: cluster.client("scancel", "--signal=USR1", f"{job_id}.0"),
        preempt,
        down_and_up,
        kill_and_revive,
    ]
    for number, disturb in enumerate(disturbances):
        wait_for_attempt(number)
        disturb()
        cluster.wait_requeued(job_id, number + 1)
    cluster.wait(job_id, "COMPLETED")
    log = cluster.job_log(job_id)
    assert log.count("code 75 in run/exit.json") == 3, "two signals and a preemption saved; two lost nodes could not"
    assert cluster.state(urgent[0]) == "COMPLETED" and cluster.job(job_id)["Restarts"] == str(len(disturbances))
    assert runs.verdict(run) | {"reason": ""} == {"code": 0, "step": runs.STEPS, "attempt": 5, "reason": ""}
    assert_equal_to_undisturbed(run, undisturbed)


@pytest.mark.nightly
def test_the_time_limit(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """`--signal` comes about a minute before the limit: saved, requeued, and again until the steps are done."""
    words = runs.tiny(
        synthetic, "run", "run.steps=100000", "eval.data=null", "checkpoint.keep_last=2", "log.every_steps=50"
    )
    job_id = runs.submit_train(cluster, tmp_path, words, *runs.FOUR_TASKS, "--time=2", "--signal=USR1@60")
    cluster.wait_requeued(job_id)
    log = cluster.job_log(job_id)
    assert "code 75 in run/exit.json" in log and "requeue of job" in log
    cluster.wait_log(job_id, "resumes from step")
    cluster.client("scancel", str(job_id))
    cluster.wait(job_id, "CANCELLED")
