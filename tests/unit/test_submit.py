"""`amclip submit`: what it refuses before sbatch, and the command that it leaves."""

import json
import subprocess
import tarfile
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
    assert (run / "slurm" / "train.sbatch").read_text() == submit.TEMPLATE.read_text()
    assert subprocess.run(["bash", "-n", run / "slurm" / "submit.sh"]).returncode == 0


def test_a_chain_goes_by_a_name_of_its_own(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = submitted(shards, "--chain", "3")
    lines = [line for line in (run / "slurm" / "submit.sh").read_text().splitlines() if "sbatch" in line]
    assert code == 0 and len(lines) == 3
    assert all("--dependency=singleton" in line and "AMCLIP_CHAIN=1" in line and "run" in line for line in lines)


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
