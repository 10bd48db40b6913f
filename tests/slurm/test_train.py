"""The usual day: a job is submitted, trains on two nodes, evaluates and ends; the same numbers as torchrun's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Finished


def test_a_job_trains_evaluates_and_completes(undisturbed: Finished) -> None:
    assert undisturbed.job["JobState"] == "COMPLETED" and undisturbed.job["ExitCode"] == "0:0"
    assert runs.verdict(undisturbed.run)["code"] == 0
    assert {row["weights"] for row in runs.rows(undisturbed.run, "eval")} == {"student", "teacher"}
    assert runs.rows(undisturbed.run)[-1]["samples_seen"] == runs.STEPS * 24
    for reported in (
        "restart 0: 4 task(s) on 2 node(s): node[1-2]",
        "watch: tail -f",
        "starts fresh",
        str(undisturbed.run),
    ):
        assert reported in undisturbed.log, reported
    assert (undisturbed.run / "slurm" / "attempts.jsonl").exists()
    assert list((undisturbed.run / "slurm").glob("config-*-0.yaml"))


@pytest.mark.nightly
def test_torchrun_gives_the_same_losses(undisturbed: Finished, synthetic: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*torchrun, "-m", "amclip_ds", "train", *runs.tiny(synthetic, "run")]
    env = os.environ | runs.base_environment()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.losses(tmp_path / "run") == pytest.approx(runs.losses(undisturbed.run), rel=1e-5)


@pytest.mark.nightly
def test_a_job_with_gpus_gets_a_task_for_each(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """The GPUs are fake, so the run stays on the CPU; `--gpus=3` spreads unevenly over the nodes."""
    words = runs.tiny(synthetic, "run", "run.steps=2", "eval.data=null")
    job_id = runs.submit_train(cluster, tmp_path, words, "--nodes=2", "--gpus=3")
    cluster.wait(job_id, "COMPLETED")
    assert "3 task(s) on 2 node(s)" in cluster.job_log(job_id)


@pytest.mark.nightly
def test_settings_come_from_the_site_file(cluster: Cluster, synthetic: Path, tmp_path: Path) -> None:
    """A container is words before python; srun flags of one's own; what the file exports reaches the ranks."""
    seen = tmp_path / "seen"
    (tmp_path / "wrapper").write_text(f'#!/bin/bash\necho "$FROM_SITE" >> {seen}\nexec "$@"\n')
    (tmp_path / "wrapper").chmod(0o755)
    site = tmp_path / "site.env"
    site.write_text(f"AMCLIP_CONTAINER=({tmp_path}/wrapper)\nAMCLIP_SRUN=(--comment=ours)\nexport FROM_SITE=yes\n")
    words = runs.tiny(synthetic, "run", "run.steps=2", "eval.data=null")
    job_id = runs.submit_train(cluster, tmp_path, words, "-n2", env={"AMCLIP_SITE": str(site)})
    cluster.wait(job_id, "COMPLETED")
    assert seen.read_text().split().count("yes") >= 2
