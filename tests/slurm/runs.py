"""The runs that the tests of this folder submit: a tiny A-CLIP on synthetic shards, and readings of what it left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.trainers import last_of_each
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "slurm"
PYTHON = sys.executable
STEPS = 30
FOUR_TASKS = ("--nodes=2", "--ntasks-per-node=2")


def base_environment() -> dict[str, str]:
    """What a person would have exported: where the checkout and its Python are; one thread a rank."""
    return {
        "AMCLIP_HOME": str(ROOT),
        "AMCLIP_PYTHON": PYTHON,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
    }


def make_data(folder: Path) -> None:
    """Synthetic scenes of 64 pixels: train/ in six shards, and a test split in CLIP_benchmark's layout."""
    done = amclip(
        "data",
        "synth",
        "--out",
        str(folder),
        "--train",
        "600",
        "--test",
        "64",
        "--shard-size",
        "100",
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def tiny(data: Path, out: Path | str, *more: str) -> list[str]:
    """RECIPE key=value ... of a run of a few seconds: ZeRO-2, bf16, gloo."""
    words = [
        "aclip-tiny",
        f"data.train={data}/train",
        f"eval.data={data}",
        f"run.out={out}",
        f"run.steps={STEPS}",
        "engine.deepspeed=zero2_bf16.json",
        "batch.global_size=24",
        "batch.per_gpu=12",
        "data.workers=0",
        "log.every_steps=1",
        "checkpoint.every_steps=10",
        "checkpoint.keep_last=20",
        "run.deterministic=true",
        "optim.warmup_steps=5",
        "log.tensorboard=false",
        "run.log_sample_ids=true",
        *more,
    ]
    return last_of_each(words)


def submit_train(cluster: Cluster, cwd: Path, words: list[str], *flags: str, env: dict[str, str] | None = None) -> int:
    """sbatch [flags] slurm/train.sbatch RECIPE key=value ... from `cwd`."""
    return cluster.submit(*flags, str(SLURM / "train.sbatch"), *words, cwd=cwd, env=base_environment() | (env or {}))


def amclip(
    *words: str, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 900
) -> subprocess.CompletedProcess:
    """The command line, in a process of its own."""
    return subprocess.run(
        [PYTHON, "-m", "amclip_ds", *words],
        cwd=cwd,
        env=os.environ | base_environment() | (env or {}),
        text=True,
        capture_output=True,
        timeout=timeout_s,
    )


def rows(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of every step, in order; fails if a step is missing or there twice."""
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1)), [row["step"] for row in found]
    return [row["loss"] for row in found]


def verdict(run: Path) -> dict[str, Any]:
    return json.loads((run / "exit.json").read_text())


def final_weights(run: Path) -> dict[str, bytes]:
    """The bytes of every final weight file of a run, by name."""
    files = sorted(run.glob("*.safetensors"))
    assert files, f"no weights in {run}: {sorted(path.name for path in run.iterdir())}"
    return {path.name: path.read_bytes() for path in files}
