"""`amclip doctor RUN` on runs that do not learn: what each suffers from is named."""

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from amclip_ds import config
from amclip_ds.doctor import FAIL, OK, WARN, Finding, findings, learning
from amclip_ds.evaluate.datasets import EvalSet, Sample
from amclip_ds.evaluate.zero_shot import describe
from amclip_ds.model.amclip import AClip
from amclip_ds.record import evaluation_lines

BATCH = 32
WORDS = [
    f"batch.global_size={BATCH}",
    "model.vision.depth=1",
    "model.text.depth=1",
    "mask.strategy=none",
    "loss.o2o_weight=0",
    "loss.o2e_weight=0",
    "data.num_views=1",
]


def write_shard(path: Path, caption: Callable[[int], str], same_image: bool = False) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(64):
            picture = io.BytesIO()
            colours = np.random.default_rng(0 if same_image else number).integers(0, 255, (4, 4, 3), np.uint8)
            Image.fromarray(colours).resize((64, 64)).save(picture, "JPEG")
            for suffix, content in (("jpg", picture.getvalue()), ("txt", caption(number).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_run(
    folder: Path,
    words: list[str],
    row: Callable[[int], dict[str, Any]] = lambda step: {},
    caption: Callable[[int], str] = lambda number: f"a picture of thing number {number}",
) -> Path:
    run = folder / "run"
    run.mkdir()
    write_shard(folder / "0.tar", caption)
    length = [] if "run.epochs=20" in words else ["run.steps=400"]
    settings = config.load("clip-tiny", [*WORDS, *length, f"data.train={folder}/0.tar", f"run.out={run}", *words])
    (run / "config.yaml").write_text(config.dump(settings))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10, 401, 10):
            good = {
                "step": step,
                "samples_seen": step * BATCH,
                "loss": 1.0,
                "loss_contrastive": 3.4 - step / 200,
                "logit_scale": 14.0 + step / 100,
                "grad_norm": 2.0,
                "step_applied": True,
                "lr": 1e-4,
            }
            file.write(json.dumps(good | row(step)) + "\n")
    return run


def worst(run: Path, *names: str) -> dict[str, Finding]:
    checks = learning.checks(run)
    found: dict[str, Finding] = {}
    for finding in findings({name: checks[name] for name in names or checks}):
        known = found.get(finding.name)
        if known is None or (OK, WARN, FAIL).index(finding.status) > (OK, WARN, FAIL).index(known.status):
            found[finding.name] = finding
    return found


def test_a_run_that_learns_is_well(tmp_path: Path) -> None:
    found = worst(make_run(tmp_path, []))
    assert {name: one.status for name, one in found.items() if one.status != OK} == {}, found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=1"], "times what is usual"),
        (["optim.lr=1e-9"], "times below what is usual"),
        (["optim.warmup_steps=400"], "optim.lr is never reached"),
        (
            ["run.epochs=20", "optim.warmup_steps=40"],
            "warm-up takes 40 steps and the run has 40: optim.lr is never",
        ),
    ],
)
def test_learning_rates(tmp_path: Path, words: list[str], said: str) -> None:
    found = worst(make_run(tmp_path, words), "learning rate")["learning rate"]
    assert found.status == FAIL and said in found.found and found.fix.startswith("optim.")


def test_a_second_stage_has_a_low_rate(tmp_path: Path) -> None:
    """flip-tune's is a hundredth; at a batch of 16,384, whose usual one is twice 4,096's, less than that."""
    found = worst(make_run(tmp_path, ["optim.lr=1e-9", "model.init_from=runs/first"]), "learning rate")
    assert found["learning rate"].status == OK


def test_a_loss_at_chance_and_one_that_diverged(tmp_path: Path) -> None:
    chance = math.log(BATCH)
    run = make_run(tmp_path, [], lambda step: {"loss_contrastive": chance})
    found = worst(run, "loss")["loss"]
    assert found.status == FAIL and f"ln({BATCH}) = {chance:.3f}" in found.found


def test_a_loss_that_diverged(tmp_path: Path) -> None:
    run = make_run(tmp_path, [], lambda step: {"loss_contrastive": 1.0 if step == 200 else 3.0})
    found = worst(run, "loss")["loss"]
    assert found.status == WARN and "it was 1.000 at step 200" in found.found


def test_a_logit_scale_that_is_pinned(tmp_path: Path) -> None:
    run = make_run(tmp_path, [], lambda step: {"logit_scale": min(100.0, float(step))})
    found = worst(run, "logit scale")["logit scale"]
    assert found.status == WARN and "since step 100" in found.found


def test_a_logit_scale_at_its_floor(tmp_path: Path) -> None:
    assert worst(make_run(tmp_path, [], lambda step: {"logit_scale": 1.0}), "logit scale")["logit scale"].status == FAIL


def test_steps_that_are_skipped(tmp_path: Path) -> None:
    run = make_run(tmp_path, [], lambda step: {"step_applied": step % 20 == 0, "grad_norm": None})
    assert worst(run, "gradients")["gradients"].status == FAIL


def test_one_caption_for_all(tmp_path: Path) -> None:
    run = make_run(tmp_path, [], caption=lambda number: "an image from the web")
    found = worst(run, "data")
    assert found["captions"].status == FAIL and "64 x 'an image from the web'" in found["captions"].found
    assert found["images"].status == OK


def test_one_image_for_all(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    write_shard(tmp_path / "0.tar", lambda number: f"a picture of thing number {number}", same_image=True)
    found = worst(run, "data")
    assert found["images"].status == FAIL and found["captions"].status == OK


def test_collapsed_features(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    assert "not measured" in worst(run, "features")["features"].found
    torch.manual_seed(0)
    module = AClip(config.load_run(run / "config.yaml").model)
    weights = {name: torch.randn(p.shape) * 0.05 for name, p in module.named_parameters()}
    weights["vision.norm.weight"] = torch.zeros_like(weights["vision.norm.weight"])  # every image is the bias
    save_file(weights, run / "student.safetensors", {"step": "400", "weights": "student"})
    found = worst(run, "features")["features"]
    assert found.status == FAIL and "collapsed: mean cosine of different images" in found.found


def test_a_spike_is_one_incident_however_many_ranks_list_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    rows = [{"step": step, "attempt": 0, "kind": "loss_spike", "cause": "x"} for step in (7, 7, 7, 7, 9, 9, 9, 9)]
    (run / "incidents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert worst(run, "ending")["ending"].found.endswith("; 2 x loss_spike")


def test_an_evaluation_at_chance(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    for hits, seen, status in ((105, 1e7, FAIL), (105, 1e5, WARN), (500, 1e7, OK)):
        row = {"step": 400, "loss": 1.0, "loss_contrastive": 1.0, "samples_seen": seen}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        for name in ("eval.jsonl", "eval_classes.jsonl"):
            (run / name).unlink(missing_ok=True)
        predicted = np.where(np.arange(1000) < hits, np.arange(1000) % 10, np.arange(1, 1001) % 10)
        data = EvalSet("scenes", "zeroshot_classification", (Sample("", 0, 0, ""),), tuple("abcdefghij"))
        row = describe(
            predicted, (predicted != np.arange(1000) % 10).astype(int), np.arange(1000) % 10, None, "student", data, 400
        )
        older, probe = row | {"step": 40, "metrics": {"acc1": 0.3}}, row | {"task": "knn", "metrics": {"acc1": 0.9}}
        for name, lines in evaluation_lines([row, older, probe]).items():  # neither is the run's last accuracy
            (run / name).write_bytes(lines)
        found = worst(run, "evaluation")["evaluation"]
        assert found.status == status and f"acc1 {hits / 1000:.4f} at step 400, chance 0.1000" in found.found
