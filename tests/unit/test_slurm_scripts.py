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


def sleep_for_real(programs: Path) -> None:
    """Where a step may be long in coming, on a busy machine: train.sbatch waits 24 sleeps for it."""
    write(programs / "sleep", "exec /bin/sleep 1")


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
    """Each answer is given once, the last one for ever. The first is what the job finds out about itself."""
    for name, answers in (("show", [RUNNING, *shows]), ("requeue", requeues)):
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
    sleep_for_real(programs)
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


ANSWER = 'printf "%s\\n" run 12345 auto 1 ""'
RECORD = RUNNING + " Restarts=0 NumTasks=1 NtasksPerN:B:S:C=0:0:*:* MinMemoryNode=100M"  # of a job of one node
ONE_NODE = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}


def a_job(programs: Path, *srun: str, begin: str = ANSWER, record: str = RUNNING) -> None:
    """A Slurm that runs what train.sbatch asks for; `asked` gets srun's words and variables, a line each."""
    write(programs / "python", f'case "$3" in begin) {begin} ;; end) echo exit 0 ;; esac')
    write(programs / "squeue", "echo train")
    write(programs / "sinfo", "true")
    write(programs / "scontrol", '[ "$1" = requeue ] && touch "$SLURM_SUBMIT_DIR/requeued"', record)
    write(programs / "srun", 'cd "$SLURM_SUBMIT_DIR"', '{ env; printf "%s\\n" "$@"; } >asked', *srun)


def train(programs: Path, **env: str) -> subprocess.CompletedProcess:
    """Into a file, as Slurm has it: to the same at every start."""
    log = programs.parent / "log"
    words = 'exec >>"$1" 2>&1; exec bash "$2" clip-tiny'
    done = run(programs, "bash", "-c", words, "bash", str(log), str(ROOT / "slurm/train.sbatch"), **ONE_NODE | env)
    done.stdout = log.read_text()
    return done


def test_a_job_without_an_environment_hands_its_own_to_the_ranks(programs: Path) -> None:
    """--export=NONE, which srun reads as SLURM_EXPORT_ENV: no MASTER_PORT, no NCCL_* would arrive."""
    a_job(programs)
    assert train(programs, SLURM_EXPORT_ENV="NONE").returncode == 0
    assert "SLURM_EXPORT_ENV=ALL" in (programs.parent / "asked").read_text().splitlines()


def test_the_ranks_step_contradicts_nothing_that_the_job_asked_for(programs: Path) -> None:
    """--ntasks-per-node goes with no --ntasks-per-gpu; a rank chooses among all GPUs of its node."""
    a_job(programs, record=f"{RUNNING} TresPerJob=gres:gpu:4")
    words = {"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_GPU": "1", "SLURM_GPU_BIND": "closest"}
    assert train(programs, **words).returncode == 0
    asked = (programs.parent / "asked").read_text()
    assert "--ntasks-per-node=4" in asked and "SLURM_NTASKS_PER_GPU" not in asked and "SLURM_GPU_BIND" not in asked
    assert train(programs, SLURM_GPUS="4", SLURM_GPU_BIND="single:1").returncode == 0
    asked = (programs.parent / "asked").read_text()
    assert "--gpus-per-task=1" in asked and "SLURM_GPU_BIND=single:1" in asked


LEFT_BY_ANOTHER_JOB = {
    "SLURM_ARRAY_JOB_ID": "3",
    "SLURM_ARRAY_TASK_ID": "4",
    "SLURM_RESTART_COUNT": "5",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "16",
    "SLURM_GPUS": "16",
    "SLURM_GPUS_PER_NODE": "16",
    "SLURM_GPUS_PER_TASK": "2",
    "SLURM_CPUS_PER_GPU": "6",
    "SLURM_MEM_PER_CPU": "1000",
    "SLURM_MEM_PER_GPU": "1000",
    "SLURM_MEM_PER_NODE": "100",
    "SLURM_STEP_ID": "0",
    "SLURM_CPU_BIND": "x",
    "SLURM_CPU_BIND_LIST": "x",
    "SLURM_DISTRIBUTION": "cyclic",
}


def test_a_job_that_was_submitted_from_another_is_no_part_of_it(programs: Path) -> None:
    """sbatch hands it the other's SLURM_*: the other's task of an array would be requeued, its layout asked for."""
    a_job(programs)
    write(
        programs / "python",
        f'case "$3" in begin) echo "$@" >"$SLURM_SUBMIT_DIR/begun"; {ANSWER} ;; end) echo requeue why ;; esac',
    )
    write(programs / "scontrol", '[ "$1" != requeue ] || echo "$2" >"$SLURM_SUBMIT_DIR/requeued"', RECORD)
    done = train(programs, **LEFT_BY_ANOTHER_JOB)
    assert done.returncode == 0 and (programs.parent / "requeued").read_text() == "7\n", done.stdout
    begun = (programs.parent / "begun").read_text()
    assert "--job 7 --restart 0 " in begun and "--tasks 1 " in begun and "--tasks-per-node" not in begun
    asked = (programs.parent / "asked").read_text().splitlines()
    kept = {name for name in LEFT_BY_ANOTHER_JOB if any(line.startswith(f"{name}=") for line in asked)}
    assert kept == {"SLURM_RESTART_COUNT", "SLURM_NTASKS", "SLURM_MEM_PER_NODE"} and "SLURM_NTASKS=1" in asked


def test_a_task_of_an_array_is_requeued_alone(programs: Path) -> None:
    """The last one's number is the array's: Slurm then shows all of them, and each has counted its own restarts."""
    a_job(programs, begin='echo "$@" >"$SLURM_SUBMIT_DIR/begun"; ' + ANSWER)
    rows = [
        f"JobId={job} ArrayJobId=7 JobState=RUNNING Restarts={restarts} NumTasks=1"
        for job, restarts in ((8, 3), (7, 2))
    ]
    write(programs / "scontrol", *(f"echo {row}" for row in rows))
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4", "SLURM_RESTART_COUNT": "9"}
    assert train(programs, **array).returncode == 0
    assert "--job 7_4 --restart 2 " in (programs.parent / "begun").read_text()


@pytest.mark.parametrize(("script", "has_gpus"), [("train", False), ("eval", True)])
def test_a_step_of_one_task_does_not_ask_for_the_jobs_gpus(programs: Path, script: str, has_gpus: bool) -> None:
    """Of --gpus=16 on two nodes a node has not all. Watching evaluates, and keeps what the node has."""
    a_job(programs, record=f"{RUNNING} TresPerJob=gres:gpu:16 CpusPerTres=gres:gpu:4")
    write(programs / "srun", 'cd "$SLURM_SUBMIT_DIR"', '{ env; printf "%s\\n" "$@"; } >asked; exit 2')
    (programs.parent / "site.env").write_text("AMCLIP_SRUN=(--container-image=x)\n")
    job = ONE_NODE | {"SLURM_GPUS": "16", "SLURM_CPUS_PER_GPU": "4", "SLURM_CPUS_PER_TASK": "8"}
    site = {"AMCLIP_SITE": str(programs.parent / "site.env")}
    assert run(programs, "bash", str(ROOT / f"slurm/{script}.sbatch"), "clip-tiny", **job | site).returncode == 2
    asked = (programs.parent / "asked").read_text().splitlines()
    assert not any(line.startswith(("SLURM_GPUS=", "SLURM_CPUS_PER_GPU=")) for line in asked)
    assert ("--gres=none" not in asked) == has_gpus and "--cpus-per-task=8" in asked


@pytest.mark.parametrize("what", ["folder", "python", "begin"])
def test_a_start_that_fails_where_an_earlier_one_did_not_is_tried_on(programs: Path, what: str) -> None:
    """Twice; a third time in a row, or in the first start of all, it ends the job."""
    a_job(programs, begin="exit 1" if what == "begin" else ANSWER)
    broken = {"folder": {"SLURM_SUBMIT_DIR": "/not/mounted"}, "python": {"AMCLIP_PYTHON": "/no/python"}}.get(what, {})
    write(programs / "scontrol", f'[ "$1" = requeue ] && touch {programs.parent}/requeued', RUNNING)
    requeued, code = programs.parent / "requeued", 1 if what == "begin" else 2
    assert train(programs, **broken).returncode == code and not requeued.exists()
    for _ in range(2):
        done = train(programs, SLURM_RESTART_COUNT="1", **broken)
        assert done.returncode == 0 and requeued.exists(), done.stdout
        requeued.unlink()
    with (programs.parent / "log").open("a") as log:
        log.write("train.sbatch: job 7, restart 3: 1 task(s) on 1 node(s): node1\n")  # one that was well
    for _ in range(2):
        assert train(programs, SLURM_RESTART_COUNT="4", **broken).returncode == 0
        requeued.unlink()
    done = train(programs, SLURM_RESTART_COUNT="6", **broken)
    assert done.returncode == code and not requeued.exists() and "3 starts in a row failed" in done.stdout


@pytest.mark.parametrize("script", ["train", "eval", "sweep", "compare", "data"])
def test_a_restart_on_a_node_without_the_checkout_is_tried_on(programs: Path, script: str) -> None:
    """Twice; in a job's first start it is a mistake."""
    log, requeued = programs.parent / "log", programs.parent / "requeued"

    def start(restarts: int, array: str = "") -> int:
        record = f"echo JobId=7 {array} JobState=RUNNING Restarts={restarts}"
        write(programs / "scontrol", f'[ "$1" = requeue ] && echo "$2" >{requeued}', record)
        requeued.unlink(missing_ok=True)
        left = {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "4"}  # of another job: see environment.sh
        words = ["bash", "-c", f'exec bash "$0" a b c >>{log} 2>&1', str(ROOT / f"slurm/{script}.sbatch")]
        return run(programs, *words, AMCLIP_HOME="/not/mounted", **left).returncode

    assert start(0) == 2 and f"{script}.sbatch: no checkout at /not/mounted: submit " in log.read_text()
    assert not requeued.exists()
    assert start(1) == 0 and requeued.read_text() == "7\n", log.read_text()
    assert start(2, "ArrayJobId=5 ArrayTaskId=6") == 0 and requeued.read_text() == "5_6\n"
    assert start(3) == 2 and not requeued.exists(), "three in a row"


def test_a_job_that_is_over_is_not_tried_on(programs: Path) -> None:
    a_job(programs, begin="echo exit 3; exit 3")
    done = train(programs, SLURM_RESTART_COUNT="1")
    assert done.returncode == 3 and not (programs.parent / "requeued").exists() and "failed" not in done.stdout


def test_a_signal_that_comes_before_the_step_reaches_the_ranks(programs: Path) -> None:
    """An srun that has no step yet would die of it: it is kept until there is one."""
    sleep_for_real(programs)
    a_job(
        programs,
        "kill -USR1 $PPID; /bin/sleep 0.5; trap 'echo heard >>heard; exit 0' USR1; touch step",
        "for turn in {1..1200}; do /bin/sleep 0.05; done",
    )
    write(programs / "squeue", '[ ! -e "$SLURM_SUBMIT_DIR/step" ] || echo train')
    done = train(programs)
    assert done.returncode == 0 and (programs.parent / "heard").read_text() == "heard\n", done.stdout


def test_a_chain_is_as_old_as_its_job(programs: Path) -> None:
    a_job(programs, begin='echo "$@" >"$SLURM_SUBMIT_DIR/begun"; ' + ANSWER)
    write(
        programs / "squeue",
        'case "$*" in *%V) [ "$SLURM_TIME_FORMAT" = %s ] && echo 1700000000 ;; *) echo train ;; esac',
    )
    for value, asked in (("1", "--chain --queued 1700000000 "), ("1600000000", "--chain --submitted 1600000000 ")):
        assert train(programs, AMCLIP_CHAIN=value).returncode == 0
        assert asked in (programs.parent / "begun").read_text()


def test_python_is_that_of_the_site_else_the_one_that_submitted(programs: Path, tmp_path: Path) -> None:
    for name in ("own/bin", "system", "AMCLIP_HOME"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path / "own/bin/python", "true")
    write(tmp_path / "system/python3", "true")
    shown = f'submit_python={tmp_path}/system/python3; . "{ROOT}/slurm/environment.sh"; echo $python'
    home = {"AMCLIP_HOME": str(tmp_path / "AMCLIP_HOME"), "AMCLIP_PYTHON": ""}
    done = run(programs, "bash", "-c", shown, **home)
    assert done.stdout.strip() == f"{tmp_path}/system/python3", done.stdout + done.stderr
    done = run(programs, "bash", "-c", shown, **home, AMCLIP_VENV=f"{tmp_path}/own")
    assert done.stdout.strip() == f"{tmp_path}/own/bin/python"


def test_a_site_file_may_read_what_is_not_set(programs: Path, tmp_path: Path) -> None:
    """As conda's activate does. Our own scripts may not."""
    (tmp_path / "site.env").write_text('PS1="(base) $PS1_OF_NONE"\n')
    shown = f'. "{ROOT}/slurm/environment.sh"; echo read; echo "$ANOTHER_OF_NONE"; echo continued'
    write(programs / "python", "true")
    done = run(programs, "bash", "-c", f"job_file=x; {shown}", AMCLIP_SITE=str(tmp_path / "site.env"))
    assert done.stdout == "read\n" and "ANOTHER_OF_NONE: unbound" in done.stderr


@pytest.mark.parametrize("name", ["AMCLIP_CONTAINER", "AMCLIP_SRUN"])
def test_the_words_before_python_may_come_from_the_environment(programs: Path, tmp_path: Path, name: str) -> None:
    """Also where a script is read by another; the site file has the last word."""
    source = f'. "{ROOT}/slurm/environment.sh"'
    shown = f'job_file=x; {source}; {source}; printf "%s|" ${{#{name}[@]}} "${{{name}[@]}}"'
    done = run(programs, "bash", "-c", shown, **{name: "one --bind=/a  *"})
    assert done.stdout == "3|one|--bind=/a|*|", done.stdout + done.stderr
    (tmp_path / "site.env").write_text(f"{name}=('of the' site)\n")
    done = run(programs, "bash", "-c", shown, **{name: "one", "AMCLIP_SITE": str(tmp_path / "site.env")})
    assert done.stdout == "2|of the|site|", done.stdout + done.stderr


@pytest.mark.parametrize("words", ["", "env"])
def test_the_time_limits_signal_reaches_the_watching_command(programs: Path, words: str) -> None:
    a_job(programs)
    write(
        programs / "python",
        'trap "echo heard >$SLURM_SUBMIT_DIR/heard; exit 75" TERM',
        "kill -USR1 $(cat $SLURM_SUBMIT_DIR/script)",
        "for turn in {1..60}; do /bin/sleep 0.05; done; echo alone >$SLURM_SUBMIT_DIR/heard",
    )
    script = f'echo $$ >{programs.parent}/script; exec bash "{ROOT}/slurm/eval.sbatch" RUN'
    done = run(programs, "bash", "-c", script, AMCLIP_CONTAINER=words)
    assert done.returncode == 0 and (programs.parent / "requeued").exists(), done.stdout + done.stderr
    assert (programs.parent / "heard").read_text() == "heard\n"


@pytest.mark.parametrize(("last", "code"), [("7", 2), ("3", 0)])
def test_the_tasks_that_share_shards_follow_each_other(programs: Path, last: str, code: int) -> None:
    """--array=1-7:2 are four tasks, whose numbers from the first on are no 0 to 3; --array=0-3 are."""
    write(programs / "python", f'echo "$@" >>{programs}/asked')
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MAX": last}
    task = {"SLURM_ARRAY_TASK_ID": last, "SLURM_ARRAY_TASK_MIN": "0" if last == "3" else "1"}
    done = run(programs, "bash", str(ROOT / "slurm/data.sbatch"), "SHARDS", "OUT", **array, **task)
    assert done.returncode == code and (programs / "asked").exists() == (code == 0), done.stdout + done.stderr
    assert ("--array: its 4 tasks must follow each other: 0-3" in done.stdout) == (code == 2)


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_run_of_a_sweep_whose_requeue_is_refused_is_over(programs: Path, is_refused: bool) -> None:
    """The table waits for it otherwise, for ever."""
    a_job(programs)
    write(
        programs / "python",
        'case "$*" in',
        f"*overrides*) ;; *begin*) {ANSWER} ;; *finish*) echo $* >>{programs}/finished ;; *end*) echo requeue why ;;",
        "esac",
    )
    record = "echo JobId=7 ArrayJobId=7 JobState=RUNNING"
    write(programs / "scontrol", f'[ "$1" != requeue ] || {{ {REFUSED if is_refused else DONE}; }}', record)
    array = ONE_NODE | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    done = run(programs, "bash", str(ROOT / "slurm/sweep.sbatch"), "sweep.yaml", "out", "aclip-tiny", **array)
    assert done.returncode == (75 if is_refused else 0), done.stdout + done.stderr
    assert (programs / "finished").exists() == is_refused


@pytest.mark.parametrize("overrides", ["", "optim.lr=0.002"])
def test_a_run_of_a_sweep_may_be_the_recipe_as_it_is(programs: Path, overrides: str) -> None:
    write(
        programs / "python",
        f"case $* in *overrides*) echo {overrides} ;; *begin*) printf '%s\\n' \"$@\" >{programs}/begun; exit 2 ;; esac",
    )
    words = ["sweep.yaml", "out", "aclip-tiny", "optim.lr=0.001", "run.steps=4"]
    array = ONE_NODE | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    done = run(programs, "bash", str(ROOT / "slurm/sweep.sbatch"), *words, **array)
    asked = (programs / "begun").read_text().splitlines()
    own = [overrides, "run.out=out/0"] if overrides else ["run.out=out/0"]
    kept = ["aclip-tiny", *([] if overrides else ["optim.lr=0.001"]), "run.steps=4"]
    assert asked[asked.index("--") + 1 :] == kept + own, done.stdout + done.stderr
