"""The launchers people have, for real: each starts `amclip train`, and the run says who and on how many ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.e2e.trainers import tiny, verdict

# On a torch without CUDA accelerate's own console cannot import torchvision before amclip_ds has repaired it.
ACCELERATE = "import amclip_ds; from accelerate.commands.accelerate_cli import main; main()"
PYTHON = sys.executable
LAUNCHERS = {
    "torchrun": ([PYTHON, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "amclip_ds"], 2),
    "deepspeed": ([PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus=2", "--module", "amclip_ds"], 2),
    "mpirun": (["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", PYTHON, "-m", "amclip_ds"], 2),
    "accelerate": ([PYTHON, "-c", ACCELERATE, "launch", "--cpu", "--num_processes=2", "-m", "amclip_ds"], 1),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_under(name: str, scenes: Path, tmp_path: Path) -> None:
    command, ranks = LAUNCHERS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here (apt-get install --no-install-recommends openmpi-bin)")
    run = tmp_path / "run"
    words = ["train", *tiny(scenes, run, "run.steps=2", "data.workers=0")]
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    first = next(line for line in (run / "out.log").read_text().splitlines() if " steps of " in line)
    said = f"started by {name}" if ranks > 1 else f"started alone; {name} launch on the CPU starts one process"
    assert f"= {ranks} ranks x" in first and said in first, first
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2] and verdict(run)["code"] == 0
