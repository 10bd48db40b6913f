"""The job scripts against a Slurm of small scripts: what they ask of it, and what they make of its answers."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

NO_ANSWER = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
RUNNING, PENDING = "echo JobId=7 JobState=RUNNING Reason=None", "echo JobId=7 JobState=PENDING Reason=BeginTime"
DONE, REFUSED = "exit 0", "echo 'Requested operation is presently disabled for job 7' >&2; exit 1"
LOST = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder that is searched first; `sleep` takes no time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write(folder / "sleep", "exec /bin/sleep 0.05")
    return folder


def write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


def run(programs: Path, *argv: str, **env: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "AMCLIP_"))}
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(programs.parent), "AMCLIP_HOME": str(ROOT)}
    own = {"PATH": f"{programs}:{os.environ['PATH']}", "AMCLIP_PYTHON": str(programs / "python")}
    return subprocess.run(argv, env=kept | own | job | env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("shows", "requeues", "said"),
    [
        ([RUNNING], [DONE], "requeued"),
        ([NO_ANSWER, NO_ANSWER, RUNNING], [DONE], "requeued"),
        ([RUNNING], [LOST, LOST, DONE], "requeued"),
        ([RUNNING, PENDING], [LOST], "requeued"),  # it had arrived
        ([RUNNING], [REFUSED, DONE], "Slurm refuses the requeue (Requested operation is presently disabled"),
        ([PENDING], [DONE], "not requeued: Slurm is ending this job itself (JobState=PENDING)"),
        ([NO_ANSWER], [DONE], "not requeued: Slurm's controller does not answer"),
    ],
)
def test_no_answer_is_no_refusal(programs: Path, shows: list[str], requeues: list[str], said: str) -> None:
    """Each answer is given once, the last one for ever."""
    for name, answers in (("show", shows), ("requeue", requeues)):
        (programs / name).mkdir()
        for number, answer in enumerate(answers):
            write(programs / name / str(number), answer)
    write(programs / "python", "true")
    write(
        programs / "scontrol",
        '[ "$1" = requeue ] && cd "${0%/*}/requeue" || cd "${0%/*}/show"',
        'first=$(ls | sort -n | head -n 1); bash "./$first"; status=$?',
        '[ "$(ls | wc -l)" = 1 ] || rm "$first"',
        "exit $status",
    )
    asked = 'job_file=x; . "$AMCLIP_HOME/slurm/environment.sh"; requeue_job why && echo requeued || echo "$refusal"'
    done = run(programs, "bash", "-c", asked)
    assert done.stdout.splitlines()[-1].startswith(said), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= 3 and not done.stderr


@pytest.mark.parametrize("flags", ["", "--container-image=x"])
def test_a_keeper_waits_on_each_node_while_the_ranks_train(programs: Path, tmp_path: Path, flags: str) -> None:
    """With AMCLIP_SRUN too, where the attempt's begin is a step of its own before the training's."""
    (tmp_path / "site.env").write_text(f"AMCLIP_SRUN=({flags})\n")
    write(
        programs / "srun",
        'cd "$SLURM_SUBMIT_DIR"',
        'case " $* " in',
        '*" --job-name=keeper "*) echo keeper >>steps ;;',
        '*" amclip_ds train "*)',
        "  /bin/sleep 0.3; echo train >>steps",
        "  for turn in {1..200}; do ! grep -q keeper steps || exit 0; /bin/sleep 0.05; done; echo alone >>steps ;;",
        '*) echo begin >>steps; while [ "$1" != "$AMCLIP_PYTHON" ]; do shift; done; exec "$@" ;;',
        "esac",
    )
    write(programs / "squeue", 'cat "$SLURM_SUBMIT_DIR/steps"')
    write(
        programs / "scontrol",
        '[ "$1" != show ] || [ "$2" != hostnames ] || echo node1',
        '[ "$2" != step ] || [ "$(head -n 1 "$SLURM_SUBMIT_DIR/steps")" = train ]',  # step 0 that runs
    )
    write(programs / "sinfo", "true")
    write(
        programs / "python",
        'case "$3" in begin) printf "%s\\n" run 12345 auto 2 1-2 ;; end) echo "exit 0" ;; esac',
    )
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = run(
        programs, "bash", str(ROOT / "slurm/train.sbatch"), "clip-tiny", AMCLIP_SITE=str(tmp_path / "site.env"), **job
    )
    steps = (tmp_path / "steps").read_text().split()
    assert [step for step in steps if step != "begin"] == ["train", "keeper"], done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
