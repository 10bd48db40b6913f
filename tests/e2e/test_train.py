"""The main job as a user types it: synthetic and real shards through `amclip train`, and what it leaves behind."""

import json
import math
import tarfile
from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.e2e.conftest import Amclip

METRICS = {
    "step",
    "updates",
    "attempt",
    "epoch",
    "samples_seen",
    "loss",
    "loss_contrastive",
    "loss_o2o",
    "loss_o2e",
    "lr",
    "momentum",
    "logit_scale",
    "grad_norm",
    "step_applied",
    "samples_per_s",
    "data_wait_s",
    "communication_s",
    "step_s",
    "kept_tokens",
    "time",
}


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("aclip-eff", "random2x", "flip")]


@pytest.mark.parametrize("recipe", [pytest.param("aclip", marks=pytest.mark.quick), "clip", *NIGHTLY])
def test_every_method_trains_evaluates_and_records(recipe: str, scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    ranks = 2 if recipe == "aclip" else 1
    code, printed = amclip(
        "train",
        f"{recipe}-tiny",
        f"data.train={scenes}/train",
        f"eval.data={scenes}",
        f"run.out={tmp_path}/run",
        "run.steps=4",
        "log.every_steps=2",
        "batch.global_size=32",
        "run.log_sample_ids=true",
        *(["teacher.always=true"] if recipe == "clip" else []),
        ranks=ranks,
    )
    assert code == 0, printed
    run = tmp_path / "run"
    assert printed.strip().splitlines()[-1] == str(run)
    assert "Done, after step 4 of 4 (exit code 0)" in (run / "report.html").read_text()
    rows = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert all(set(row) >= METRICS for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in METRICS)
    assert all(0 < row["mfu"] < 1.1 and row["peak_memory_gib"] > 0.1 for row in rows)
    operations = [row["tflops"] * row["step_s"] for row in rows]
    assert max(operations) < 1.1 * min(operations)  # but for the captions' lengths every step does the same
    assert rows[-1]["kept_tokens"] == (64 if recipe == "clip" else 32)
    assert rows[-1]["samples_seen"] == 128
    ids = read_lines(run / "sample_ids.jsonl")
    assert [len(row["ids"]) for row in ids] == [32] * 4
    assert len({i for row in ids for i in row["ids"]}) == 128
    evaluated = {row["weights"] for row in read_lines(run / "eval.jsonl")}
    assert evaluated == ({"student", "teacher"} if recipe in ("aclip", "aclip-eff", "clip") else {"student"})
    assert {"config.yaml", "versions.json", "out.log", "student.safetensors", "tensorboard"} <= {
        path.name for path in run.iterdir()
    }
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    plan = json.loads((run / "plan.json").read_text())
    planned, measured = (plan[key]["between_steps_gib"] for key in ("predicted", "measured"))
    assert abs(measured - planned) < 0.01 * planned and "plan: " in printed
    assert "Train Epoch: 0" in (run / "out.log").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 3])
def test_an_average_that_nothing_reads_changes_no_number(
    stage: int, scenes: Path, tmp_path: Path, amclip: Amclip
) -> None:
    """teacher.always: the same losses; the average is in the checkpoint, is evaluated, and is not the student."""
    losses = {}
    for always in ("false", "true"):
        run, words = (
            tmp_path / always,
            ["run.steps=6", "batch.global_size=16", "log.every_steps=1", "heads.hidden_dim=32"],
        )
        words += [f"engine.deepspeed=zero{stage}_fp32.json", f"teacher.always={always}", "teacher.momentum=0.5"]
        words += [f"data.train={scenes}/train", f"eval.data={scenes}", f"run.out={run}"]
        code, printed = amclip("train", "flip-tiny", *words, ranks=2)
        assert code == 0, printed
        losses[always] = [row["loss"] for row in read_lines(run / "metrics.jsonl")]
        assert (run / "teacher.safetensors").exists() == (always == "true")
    assert losses["false"] == losses["true"]
    student, teacher = ((run / f"{name}.safetensors").read_bytes() for name in ("student", "teacher"))
    assert student != teacher
    assert {row["weights"] for row in read_lines(run / "eval.jsonl")} == {"student", "teacher"}


def test_real_photographs_train_with_a_falling_finite_loss(shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    shards = shared_dir / "data" / "openstax" / "train"
    code, printed = amclip(
        "train",
        "aclip-tiny",
        f"data.train={shards}/{{00000..00003}}.tar",
        f"run.out={tmp_path}/run",
        "run.steps=30",
        "log.every_steps=1",
        "batch.global_size=32",
        "optim.warmup_steps=5",
    )
    assert code == 0, printed
    losses = [row["loss"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 30 and all(map(math.isfinite, losses))
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


@pytest.mark.nightly
def test_overfit_pairs_are_retrieved(shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    """32 real pairs, trained on for long enough, find each other: R@1 above 90% both ways."""
    _copy_pairs(shared_dir / "data" / "openstax" / "train" / "00000.tar", tmp_path / "pairs.tar", 32)
    code, printed = amclip(
        "train",
        "aclip-tiny",
        f"data.train={tmp_path}/pairs.tar",
        f"run.out={tmp_path}/run",
        "run.steps=300",
        "batch.global_size=32",
        "optim.warmup_steps=10",
        "teacher.momentum=0.9",
        "data.photometric=false",
        "model.vision.freeze_patch_embed=false",
        ranks=2,
        timeout_s=600,
    )
    assert code == 0, printed
    code, printed = amclip(
        "eval",
        f"{tmp_path}/run",
        "--data",
        f"{tmp_path}/pairs.tar",
        "--task",
        "retrieval",
        "--json",
        f"{tmp_path}/retrieval.json",
    )
    assert code == 0, printed
    student = next(row for row in json.loads((tmp_path / "retrieval.json").read_text()) if row["weights"] == "student")
    assert student["metrics"]["image_retrieval_recall@1"] > 0.9
    assert student["metrics"]["text_retrieval_recall@1"] > 0.9


def _copy_pairs(source: Path, target: Path, num_pairs: int) -> None:
    """The first pairs of a shard, as a shard of their own."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        keys: list[str] = []
        for member in old:
            key = member.name.split(".")[0]
            if key not in keys:
                keys.append(key)
            if len(keys) > num_pairs:
                return
            new.addfile(member, old.extractfile(member))
