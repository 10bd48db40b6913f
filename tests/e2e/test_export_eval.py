"""A run handed over as a user does it: eval on 1, 2 and 4 ranks, export, eval of the export, watch beside it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from amclip_ds.jsonl import read_lines
from tests.e2e.conftest import Amclip

COMMAND = [sys.executable, "-m", "amclip_ds"]


@pytest.fixture(scope="module")
def run(scenes: Path, amclip: Amclip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps on 2 ranks at ZeRO stage 3."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    code, printed = amclip(
        "train",
        "aclip-tiny",
        f"data.train={scenes}/train",
        f"run.out={folder}",
        "run.steps=6",
        "optim.warmup_steps=0",
        "batch.global_size=32",
        "engine.deepspeed=zero3_fp32.json",
        ranks=2,
        timeout_s=600,
    )
    assert code == 0, printed
    return folder


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step_00000006"


def numbers(file: Path) -> dict[str, dict]:
    """Metrics by weights."""
    return {row["weights"]: row["metrics"] for row in json.loads(file.read_text())}


@pytest.fixture(scope="module")
def evaluated(run: Path, scenes: Path, amclip: Amclip, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    file = tmp_path_factory.mktemp("numbers") / "one.json"
    code, printed = amclip("eval", str(run), "--data", str(scenes), "--json", str(file))
    assert code == 0, printed
    assert "acc1" in printed and "2 of 2 rows appended" in printed
    rows = json.loads(file.read_text())
    assert {"model", "pretrained", "dataset", "task", "metrics", "language"} <= set(rows[0])
    assert rows[0]["num_samples"] == 128 and set(rows[0]["intervals"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert len(rows[0]["per_class"]) == 64
    return numbers(file)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_reads_a_stage_3_checkpoint_alike(
    ranks: int, checkpoint: Path, scenes: Path, evaluated: dict, tmp_path: Path, amclip: Amclip
) -> None:
    code, printed = amclip("eval", str(checkpoint), "--data", str(scenes), "--json", f"{tmp_path}/n.json", ranks=ranks)
    assert code == 0, printed
    assert "0 of 2 rows appended" in printed  # they are there already
    assert numbers(tmp_path / "n.json") == evaluated


def test_exports_have_the_same_accuracy(
    run: Path, scenes: Path, evaluated: dict, tmp_path: Path, amclip: Amclip, shared_dir: Path
) -> None:
    for fmt, weights, preprocess in (("open_clip", "teacher", "library"), ("hf", "student", "ours")):
        out = tmp_path / fmt
        code, printed = amclip(
            "export",
            str(run),
            "--format",
            fmt,
            "--weights",
            weights,
            "--out",
            str(out),
            "--proof",
            str(shared_dir / "data/openstax/test/00000.tar"),
        )
        assert code == 0 and "same pixels: cosine" in printed, printed
        code, printed = amclip(
            "eval", str(out), "--data", str(scenes), "--json", f"{out}.json", "--preprocess", preprocess
        )
        assert code == 0, printed
        assert numbers(Path(f"{out}.json")) == {weights: evaluated[weights]}
        code, printed = amclip("export", str(run), "--format", fmt, "--out", str(out))
        assert code == 2 and "exists" in printed, printed
    code, printed = amclip(
        "eval", str(tmp_path / "hf"), "--data", str(scenes), "--json", f"{tmp_path}/own.json", "--preprocess", "library"
    )
    assert code == 0, printed
    assert abs(numbers(tmp_path / "own.json")["student"]["acc1"] - evaluated["student"]["acc1"]) <= 0.005


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_a_consolidated_checkpoint_is_what_the_run_wrote(
    weights: str, run: Path, tmp_path: Path, amclip: Amclip
) -> None:
    out = tmp_path / "whole.safetensors"
    code, printed = amclip("checkpoints", str(run), "consolidate", "--weights", weights, "--out", str(out))
    assert code == 0, printed
    ours, theirs = load_file(out), load_file(run / f"{weights}.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_probes(run: Path, scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    code, printed = amclip(
        "eval",
        str(run),
        "--data",
        str(scenes),
        "--task",
        "knn",
        "--task",
        "linear_probe",
        "--weights",
        "student",
        "--json",
        f"{tmp_path}/n.json",
        timeout_s=600,
    )
    assert code == 0, printed
    knn, probe = json.loads((tmp_path / "n.json").read_text())
    assert knn["task"] == "knn" and knn["num_train"] == 600 and probe["best_c"] > 0
    assert probe["metrics"]["acc1"] > 2 / 64  # colours show in any feature


MISTAKES = [
    (["eval", "NOWHERE", "--data", "SCENES"], "neither a run"),
    (["eval", "RUN", "--data", "NOWHERE"], "NOWHERE"),
    (["eval", "RUN", "--data", "SCENES", "--task", "retrieval", "--split", "none"], "SCENES: has no split 'none'"),
    (["eval", "RUN", "--data", "SCENES", "--templates", "NOWHERE"], "NOWHERE: missing"),
    (["export", "NOWHERE", "--format", "hf", "--out", "OUT"], "neither a run"),
    (["watch", "NOWHERE", "--once"], "config.yaml: missing"),
]


@pytest.mark.parametrize(("typed", "said"), MISTAKES, ids=[" ".join(typed) for typed, _ in MISTAKES])
def test_a_mistake_is_one_line_and_code_2(
    typed: list[str], said: str, run: Path, scenes: Path, tmp_path: Path, amclip: Amclip
) -> None:
    places = {"RUN": run, "SCENES": scenes, "NOWHERE": tmp_path / "nowhere", "OUT": tmp_path / "out"}

    def fill(word: str) -> str:
        for name, path in places.items():
            word = word.replace(name, str(path))
        return word

    code, printed = amclip(*map(fill, typed))
    assert code == 2, printed
    lines = [line for line in printed.splitlines() if line.startswith(f"amclip {typed[0]}: ")]
    assert len(lines) == 1 and fill(said) in lines[0], printed


def test_a_torn_or_damaged_checkpoint_is_never_evaluated(
    run: Path, checkpoint: Path, scenes: Path, tmp_path: Path, amclip: Amclip
) -> None:
    """Half-written, cut short, one byte flipped: no row. The whole one beside them: its rows, once."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", copy)
    for name in (".tmp-step_00000005", "step_00000003", "step_00000004", "step_00000006"):
        shutil.copytree(checkpoint, copy / "checkpoints" / name)
    (copy / "checkpoints" / "step_00000003" / "model" / "rank0000.safetensors").write_bytes(b"short")
    whole = copy / "checkpoints" / "step_00000006"
    code, printed = amclip("watch", str(copy), "--data", str(scenes), "--once")
    assert code == 0 and "step_00000006 student scenes: acc1" in printed, printed
    rows = read_lines(copy / "eval.jsonl")
    assert sorted((row["step"], row["weights"]) for row in rows) == [(6, "student"), (6, "teacher")]
    assert not list(whole.glob("pinned*"))
    code, printed = amclip("watch", str(copy), "--data", str(scenes), "--once")
    assert code == 0 and "student" not in printed and read_lines(copy / "eval.jsonl") == rows
    (copy / "eval.jsonl").unlink()
    file = whole / "model" / "rank0001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, printed = amclip("watch", str(copy), "--data", str(scenes), "--once")
    assert code == 0 and "does not match its hash" in printed and not (copy / "eval.jsonl").exists(), printed


def test_watch_beside_a_run_that_is_killed_and_resumed(scenes: Path, tmp_path: Path) -> None:
    """Both are killed and started again: each checkpoint that was committed is evaluated, none twice."""
    run, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    training = [
        *COMMAND,
        "train",
        "aclip-tiny",
        f"data.train={scenes}/train",
        f"run.out={run}",
        "run.steps=8",
        "batch.global_size=16",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        "data.workers=0",
    ]
    watching = [*COMMAND, "watch", str(run), "--data", str(scenes), "--every-s", "0.2", "--weights", "teacher"]
    with (tmp_path / "log").open("wb") as log:

        def start(command: list[str]) -> subprocess.Popen:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

        def kill(process: subprocess.Popen) -> None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        processes = [start(training), start(watching)]
        try:
            deadline = time.monotonic() + 300
            while not (run / "checkpoints" / "step_00000004").is_dir():
                assert time.monotonic() < deadline and processes[0].poll() is None, (tmp_path / "log").read_text()[
                    -2000:
                ]
                time.sleep(0.05)
            for process in processes:
                kill(process)
            processes = [start(training), start(watching)]
            assert processes[0].wait(timeout=300) == 0, (tmp_path / "log").read_text()[-2000:]
            assert processes[1].wait(timeout=300) == 0, (tmp_path / "log").read_text()[-2000:]
        finally:
            for process in processes:
                if process.poll() is None:
                    kill(process)
    steps = [row["step"] for row in read_lines(run / "eval.jsonl")]
    assert sorted(steps) == [2, 4, 6, 8]
    assert [path.name for path in (run / "checkpoints").glob("*/pinned*")] == []
