"""On a real GPU a resumed run equals an uninterrupted one too: bf16, world 1, deterministic kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amclip_ds.checkpoint import step_folders
from amclip_ds.data.synthetic import write_dataset
from tests.distributed.cases_checkpoint import GLOBAL_BATCH, TOTAL
from tests.distributed.test_checkpoint_run import hashes, numbers
from tests.harness import run_alone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CASE = "tests.distributed.cases_checkpoint:run"
CUT = 13


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_13_and_27_steps_are_40(stage: int, tmp_path: Path) -> None:
    settings = {"ds": f"zero{stage}_bf16.json", "micro": GLOBAL_BATCH, "folder": str(tmp_path)}
    whole = run_alone(CASE, steps=CUT, go_on=TOTAL - CUT, **settings)
    rest = run_alone(CASE, steps=TOTAL - CUT, resume=True, save=False, **settings)
    assert rest["rows"] == whole["rows"][CUT:]
    assert rest["loaded"] == whole["digest"]
    assert rest["final"] == whole["final"]
    broken = run_alone(CASE, steps=2, resume=True, save=False, forget=("exp_avg_sq",), **settings)
    assert broken["rows"] != whole["rows"][CUT : CUT + 2], "the twin: a load that forgets is seen"


def test_a_run_cut_after_13_of_40_steps(tmp_path: Path) -> None:
    """The command itself, at the paper's main size."""
    write_dataset(tmp_path / "scenes", 300, 8, 224, 0)
    keys = [
        "aclip-vitb16",
        f"data.train={tmp_path}/scenes/train",
        "run.steps=40",
        "run.epochs=null",
        "batch.global_size=32",
        "checkpoint.every_steps=13",
        "checkpoint.keep_last=9",
        "data.workers=4",
        "log.every_steps=1",
        "log.tensorboard=false",
        "run.deterministic=true",
        "run.log_sample_ids=true",
        "optim.warmup_steps=4",
        "engine.deepspeed=zero2_bf16.json",
    ]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(*keys, f"run.out={whole}")
    place = whole / "checkpoints" / step_folders.folder_name(CUT)
    train(*keys, f"run.out={rest}", "--resume", str(place))
    assert numbers(rest) == numbers(whole)[CUT:] and len(numbers(rest)) == 27
    last = step_folders.folder_name(40)
    assert hashes(rest / "checkpoints" / last) == hashes(whole / "checkpoints" / last)


def train(*words: str) -> None:
    """`amclip train WORDS`, alone on the GPU."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "amclip_ds", "train", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
