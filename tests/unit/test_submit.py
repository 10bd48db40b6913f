"""`amclip submit`: what it refuses before sbatch, and the command that it leaves."""

import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from amclip_ds import submit
from amclip_ds.cli import main


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four small tars, each with a batch's samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (tmp_path / "0.txt").write_text("a caption")
    for number in range(4):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for sample in range(64):
                tar.add(tmp_path / "0.txt", f"{sample}.jpg")
                tar.add(tmp_path / "0.txt", f"{sample}.txt")
    return folder


def submitted(shards: Path, *words: str) -> tuple[int, Path]:
    """A dry run. Returns the code and the run's folder."""
    run = shards.parent / "run"
    argv = ["submit", "aclip-tiny", f"data.train={shards}", f"run.out={run}", "run.steps=5", "--dry-run", *words]
    return main(argv), run


def test_a_dry_run_leaves_script_config_and_command(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = submitted(
        shards,
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--time",
        "1:00:00",
        "--sbatch=--qos=low",
        "data.stage_dir=/proc/local-nvme",  # of the compute nodes alone
        "--json",
        str(shards.parent / "plan.json"),
    )
    printed = capsys.readouterr().out
    assert code == 0 and "batch: 64 = 8 ranks x 8" in printed and "memory: " in printed and "4 shards, 3 of" in printed
    command = json.loads((shards.parent / "plan.json").read_text())["command"]
    assert command[:2] == ["sbatch", "--parsable"] and command[-5] == "aclip-tiny"
    assert {"--nodes=2", "--gpus-per-node=4", "--time=1:00:00", "--qos=low"} <= set(command)
    script = (run / "slurm" / "train.sbatch").read_text()
    own = f"AMCLIP_HOME={submit.HOME}\nsubmit_python={sys.executable}\n"
    assert own in script and script.replace(own, "") == submit.TEMPLATE.read_text()
    assert script.index(own) > script.rindex("\n#SBATCH"), "sbatch reads its lines up to the first command"
    assert subprocess.run(["bash", "-n", run / "slurm" / "submit.sh"]).returncode == 0


def test_a_chain_goes_by_a_name_of_its_own(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        words = ["submit", "aclip-tiny", f"data.train={shards}", "run.steps=4", "run.out=runs/first", "--dry-run"]
        assert main([*words, "--tasks-per-node", "1", "--chain", "2"]) == 0
        names |= set(re.findall(r"--job-name=(amclip-runs-first-\w+)", capsys.readouterr().out))
    assert len(names) == 2, "of two folders of that name"

    code, run = submitted(shards, "--chain", "3")
    lines = [line for line in (run / "slurm" / "submit.sh").read_text().splitlines() if line.startswith("sbatch ")]
    assert code == 0 and len(lines) == 3
    assert all("--dependency=singleton" in line and "run" in line for line in lines)


@pytest.mark.parametrize("words", [["--dependency=afterok:17"], ["-dafterok:17"], ["--dependency", "afterok:17"]])
def test_the_jobs_of_a_chain_wait_for_each_other_and_for_what_else_is_asked(words: list[str], shards: Path) -> None:
    """Of two dependencies sbatch heeds the last: all jobs of the chain would run at once."""
    code, run = submitted(shards, "--chain", "2", *(f"--sbatch={word}" for word in words))
    command = (run / "slurm" / "submit.sh").read_text().splitlines()[-1].split()
    last = next(word for word in reversed(command) if word.startswith(("--dependency", "-d")))
    assert code == 0 and last == "--dependency=singleton,afterok:17"


def test_a_chain_carries_the_time_at_which_it_was_submitted(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To Slurm a requeue is another. A submit.sh that is run later, or once more, submits another chain."""
    before = int(time.time())
    code, run = submitted(shards, "--chain", "2")
    script = run / "slurm" / "train.sbatch"
    [since] = re.findall(r"^AMCLIP_CHAIN=(\d+)$", script.read_text(), re.M)
    assert code == 0 and before <= int(since) <= time.time()
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "date").write_text("#!/bin/sh\necho 2000000000\n")
    (tmp_path / "date").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert subprocess.run(["bash", run / "slurm" / "submit.sh"]).returncode == 0
    assert re.findall(r"^AMCLIP_CHAIN=(.*)$", script.read_text(), re.M) == ["2000000000"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nodes", "5", "batch.global_size=80"], "data.train: 4 shard(s) for 5 nodes"),
        (["--nodes", "3"], "batch.global_size: 64 = 3 ranks x 21 + 1"),
        (["--nodes", "0"], "--nodes: 0 is below 1"),
        (["--gpu-memory", "10MB"], "--gpu-memory 10MB: the model state alone is"),
        (["--gpu", "h1000"], "--gpu h1000: not known; did you mean h100?"),
        (["--gpu-memory", "250MB"], "GB are needed at the peak on each of 1 ranks with batch.per_gpu=64"),
        (["--gpu-memory", "much"], "--gpu-memory: 'much' is no size"),
        (["batch.global_size=512"], "an epoch has 256 samples, batch.global_size needs 512"),
        (["model.init_from=/nowhere"], "model.init_from: no such file or folder: /nowhere"),
        (["model.vision.name=vit_bse_patch16_224"], "model.vision.name: timm has no 'vit_bse_patch16_224'"),
        (["--gpus", "8"], "--gpus: unknown option; did you mean --gpus-per-node?"),
        (["optim.lrr=1"], "optim.lrr: unknown key"),
        (["--sbatch=--nodes=2"], "--sbatch: --nodes=2: give --nodes"),
        (["--sbatch=-N2"], "--sbatch: -N2: give --nodes"),
        (["--chain", "2", "--sbatch=-dafterok:1?afterok:2"], "--chain: -dafterok:1?afterok:2: `?` asks for any one of"),
    ],
)
def test_what_cannot_run_is_refused(words: list[str], said: str, shards: Path, capsys: pytest.CaptureFixture) -> None:
    code, run = submitted(shards, *words)
    assert code == 2 and said in capsys.readouterr().err
    assert not (run / "slurm").exists()


def test_a_broken_shard_is_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "00003.tar").write_text("no tar")
    assert submitted(shards)[0] == 2 and "00003.tar" in capsys.readouterr().err


def test_sbatchs_own_words_are_reported(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal of sbatch (here a program of that name) is one line with its reason."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "sbatch"
    fake.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gold' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    argv = ["submit", "aclip-tiny", f"data.train={shards}", f"run.out={tmp_path}/run", "run.steps=5"]
    assert main(argv) == 2
    assert "invalid partition specified: gold" in (error := capsys.readouterr().err)
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("within", [False, True])
def test_a_job_gets_nothing_of_the_one_that_it_is_submitted_from(
    within: bool, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In salloc its tasks and memory would be taken for the new job's; elsewhere SLURM_* are a person's own."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "sbatch"
    fake.write_text(f"#!/bin/sh\nenv >{tmp_path}/environment\necho 4711\n")
    fake.chmod(0o755)
    given = {"SLURM_NTASKS": "16", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_QOS": "low"}
    for name, value in (
        ({"SLURM_JOB_ID": "3"} if within else {}).items() | given.items() | {("PATH", f"{fake.parent}:/bin")}
    ):
        monkeypatch.setenv(name, value)
    argv = ["submit", "aclip-tiny", f"data.train={shards}", f"run.out={tmp_path}/run", "run.steps=5"]
    assert main(argv) == 0
    lines = (tmp_path / "environment").read_text().splitlines()
    assert ("SLURM_NTASKS=16" not in lines) == within and "SLURM_CONF=/etc/slurm.conf" in lines
    assert "SBATCH_QOS=low" in lines and not any(line.startswith("SLURM_JOB_ID=") for line in lines)


@pytest.mark.parametrize("taken", [0, 2])
def test_a_chain_that_sbatch_refuses_half_way_names_the_jobs_that_are_in_the_queue(
    taken: int, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site's limit of jobs a user: those submitted before it run, so they are in --json and in the error."""
    (tmp_path / "bin").mkdir()
    fake, counted = tmp_path / "bin" / "sbatch", tmp_path / "counted"
    fake.write_text(
        f"#!/bin/sh\nnumber=$(cat {counted} 2>/dev/null || echo 0)\n"
        f"[ $number -lt {taken} ] || {{ echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }}\n"
        f"echo $((number + 1)) > {counted}\necho $((4701 + number))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    argv = ["submit", "aclip-tiny", f"data.train={shards}", f"run.out={tmp_path}/run", "run.steps=5"]
    assert main([*argv, "--chain", "4", "--json", f"{tmp_path}/jobs.json"]) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    before = "; submitted before it: 4701, 4702 (scancel 4701 4702, or leave them: each continues the run)"
    assert error.endswith("QOSMaxSubmitJobPerUserLimit" + (before if taken else ""))
    assert (tmp_path / "jobs.json").exists() == bool(taken)
    assert not taken or json.loads((tmp_path / "jobs.json").read_text())["jobs"] == [4701, 4702]


def test_a_plugin_goes_with_the_job(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its absolute path, wherever the job starts; and what train.sbatch asks first takes the same words."""
    from amclip_ds import plugins, slurm_attempt
    from amclip_ds.arguments import plugin_words
    from tests.unit.conftest import forget_plugins

    text = "from amclip_ds.masks import Mask\nMASKS = {'own_of_a_job': Mask(lambda inputs, options: inputs.noise)}\n"
    (tmp_path / "job_mask.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    named = ["mask.strategy=own_of_a_job", "--json", str(tmp_path / "plan.json")]
    code, run = submitted(shards, "--plugin", "job_mask.py", *named)
    assert code == 0
    command = json.loads((tmp_path / "plan.json").read_text())["command"]
    script = next(place for place, word in enumerate(command) if word.endswith("train.sbatch"))
    words = command[script + 1 :]
    assert words[-1] == f"--plugin={tmp_path}/job_mask.py" == plugin_words(["job_mask.py"])[0]
    assert "--plugin=" in (run / "slurm" / "submit.sh").read_text()
    monkeypatch.chdir("/")
    forget_plugins()
    asked = ["begin", "--job", "7", "--nodes", "1", "--tasks", "1", "--", *words]
    assert slurm_attempt.main(asked) == 0 and plugins.identities()[0].startswith("job_mask sha256:")
    assert "job_mask sha256:" in (run / "slurm" / "config-7-0.yaml").read_text()


SINFO = {
    "gpu* gpu:a100:4(S:0-1)": 4,
    "gpu* gpu:8\ncpu (null)": 8,
    "gpu* gpu:8\ngpu* gpu:h100:4": 4,
    "cpu* (null)\ngpu gpu:8": None,
    "all* gpu:a100:2,gpu:t4:1,nvme:4": 3,
    "": None,
}


@pytest.mark.parametrize("answer", SINFO)
def test_submit_asks_for_the_gpus_of_the_partition(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sinfo says; reported how many, it is not asked."""
    (tmp_path / "answer").write_text(answer + "\n")
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert submit.gpus_of_partition(None) == SINFO[answer]


def test_a_submission_takes_those_gpus(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'gpu* gpu:4'\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    code, run = submitted(shards, "--json", str(shards.parent / "plan.json"))
    assert code == 0 and "--gpus-per-node=4" in json.loads((shards.parent / "plan.json").read_text())["command"]
    code, run = submitted(shards, "--tasks-per-node", "2", "--json", str(shards.parent / "plan.json"))
    assert code == 0 and "--gpus-per-node=4" not in json.loads((shards.parent / "plan.json").read_text())["command"]


@pytest.mark.parametrize(
    ("words", "env", "world_size", "said"),
    [
        (["--sbatch=--gres=gpu:a100:2"], {}, 4, "GPUs: 2 on each node (--gres=gpu:a100:2)"),
        (["--sbatch=--gpus=8"], {}, 8, "GPUs: 8 in all (--gpus=8)"),
        (["--sbatch=-G8"], {}, 8, "GPUs: 8 in all (-G8)"),
        (["--sbatch=-G", "--sbatch=8"], {}, 8, "GPUs: 8 in all (-G 8)"),
        (["--sbatch=--gpus-per-task=1"], {}, 2, "GPUs: as --gpus-per-task=1 has it"),
        ([], {"SBATCH_GPUS_PER_NODE": "v100:2"}, 4, "GPUs: 2 on each node (SBATCH_GPUS_PER_NODE=v100:2)"),
        ([], {"SBATCH_GRES": "gpu"}, 2, "GPUs: 1 on each node (SBATCH_GRES=gpu)"),
    ],
)
def test_gpus_that_sbatch_is_asked_for_are_not_asked_for_twice(
    words: list[str],
    env: dict[str, str],
    world_size: int,
    said: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    plan = planned(shards, tmp_path, monkeypatch, "gpu* gpu:4", "--nodes", "2", *words)
    assert plan["world_size"] == world_size and any(said in line for line in plan["found"]), plan["found"]
    assert not any("--gpus-per-node" in word for word in plan["command"])


def test_the_job_gets_the_tasks_that_were_checked(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train.sbatch counts a node's GPUs unless AMCLIP_TASKS_PER_NODE says another number."""
    script = shards.parent / "run" / "slurm" / "train.sbatch"
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "8")
    assert planned(shards, tmp_path, monkeypatch, "gpu* gpu:4", "--tasks-per-node", "2")["world_size"] == 2
    assert "\nAMCLIP_TASKS_PER_NODE=2\n" in script.read_text()
    monkeypatch.setenv("AMCLIP_TASKS_PER_NODE", "4")
    plan = planned(shards, tmp_path, monkeypatch, "gpu* gpu:4", "--nodes", "2")
    assert plan["world_size"] == 8 and "tasks: 4 on each node (AMCLIP_TASKS_PER_NODE=4)" in plan["found"]
    assert "\nAMCLIP_TASKS_PER_NODE=4\n" in script.read_text()
    monkeypatch.setenv("AMCLIP_TASKS_PER_NODE", "four")
    assert submitted(shards)[0] == 2 and "AMCLIP_TASKS_PER_NODE: 'four' is no number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jobs", "slurm"])
def test_the_copied_scripts_find_each_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sbatch runs a copy from elsewhere: they are looked for in slurm, below the folder of submission."""
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--scripts", name]) == (0 if name == "slurm" else 2)
    assert (tmp_path / name / "environment.sh").exists() == (name == "slurm")
    assert name == "slurm" or "as in --scripts jobs/slurm" in capsys.readouterr().err


def planned(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinfo: str, *words: str) -> dict:
    """The plan where sinfo answers so, if it is asked for all partitions or for the one named gold."""
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\ncase \"$*\" in *=gold|*%G) printf '{sinfo}\\n' ;; *) exit 1 ;; esac\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert submitted(shards, *words, "--json", str(shards.parent / "plan.json"))[0] == 0
    return json.loads((shards.parent / "plan.json").read_text())


def test_the_partition_is_the_one_that_sbatch_is_given(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--partition", "gold"], ["--sbatch=--partition=gold"], ["--sbatch=-pgold"]):
        assert planned(shards, tmp_path, monkeypatch, "gold gpu:4", *words)["world_size"] == 4
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    assert planned(shards, tmp_path, monkeypatch, "gold gpu:4")["world_size"] == 1
    assert planned(shards, tmp_path, monkeypatch, "gold gpu:4", "--sbatch=--partition=gold")["world_size"] == 4


def test_a_job_without_gpus_is_not_submitted_without_a_word(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = planned(shards, tmp_path, monkeypatch, "all* (null)\\nall* gpu:8")
    assert mixed["world_size"] == 1 and any("no GPUs asked for" in line for line in mixed["found"])
    asked = planned(shards, tmp_path, monkeypatch, "all* gpu:8", "--tasks-per-node", "2")
    assert not any("GPUs" in line for line in asked["found"])


def test_gpus_may_be_of_a_type(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(shards, tmp_path, monkeypatch, "all* gpu:8", "--gpus-per-node", "a100:4")
    assert plan["world_size"] == 4 and "--gpus-per-node=a100:4" in plan["command"]
    for wrong in ("a100", "a100:0", ":4", "4:4", "a100:4,v100:2"):
        assert submitted(shards, "--gpus-per-node", wrong)[0] == 2
        assert "--gpus-per-node" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "jobs"),
    [("4711", [4711]), ("4711;cluster\nbilling: 12 units", [4711]), ("welcome\n4711\n", [4711]), ("welcome", None)],
)
def test_a_sites_wrapper_of_sbatch_may_say_more(
    answer: str,
    jobs: list[int] | None,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "answer").write_text(answer)
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    argv = ["submit", "aclip-tiny", f"data.train={shards}", f"run.out={tmp_path}/run", "run.steps=5"]
    assert main(argv) == (0 if jobs else 2)
    captured = capsys.readouterr()
    if jobs:
        assert captured.out.splitlines()[-1] == "4711"
    else:
        assert "sbatch names no job (welcome); squeue --me shows what it queued" in captured.err
