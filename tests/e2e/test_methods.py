"""Every method as a user types it, on two ranks over real pairs: it trains, and keeps what it says it keeps."""

import math
from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.jsonl import read_lines
from amclip_ds.method import method_of
from amclip_ds.objectives import RECORDED
from amclip_ds.recipe_headers import all_headers
from tests.e2e.conftest import Amclip
from tests.recipes import words_of

FIRST_STAGES = {"flip-tune": "flip", "clipa-tune": "clipa-pre"}
METHODS = [header.method for header in all_headers()]


def train(
    amclip: Amclip,
    shared_dir: Path,
    out: Path,
    method: str,
    *words: str,
    ranks: int = 2,
    steps: int = 3,
    options: tuple[str, ...] = (),
) -> list[dict]:
    """The rows of a short run over OpenStax pairs."""
    shards = shared_dir / "data" / "openstax" / "train"
    code, printed = amclip(
        "train",
        *options,
        f"{method}-tiny",
        f"data.train={shards}/{{00000..00003}}.tar",
        f"run.out={out}",
        f"run.steps={steps}",
        "batch.global_size=16",
        "log.every_steps=1",
        *words,
        ranks=ranks,
    )
    assert code == 0, printed
    return read_lines(out / "metrics.jsonl")


def needed(amclip: Amclip, shared_dir: Path, folder: Path, method: str) -> list[str]:
    """A teacher for those that learn from one, a first stage for a second, a table of words for those that go by it."""
    if not words_of(method):
        return []
    if method == "frequency":
        shards = f"{shared_dir}/data/openstax/train/{{00000..00003}}.tar"
        code, printed = amclip("data", "stats", shards, "--words", f"{folder}/words.json")
        assert code == 0, printed
        return [f"data.text_mask.table={folder}/words.json"]
    if method in FIRST_STAGES:
        train(amclip, shared_dir, folder / "first", FIRST_STAGES[method], ranks=1)
        return [f"model.init_from={folder}/first"]
    train(amclip, shared_dir, folder / "teacher", "clip", ranks=1)
    return [f"distill.teacher={folder}/teacher"]


@pytest.mark.parametrize("method", METHODS)
def test_trains_on_real_pairs_on_two_ranks(method: str, shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    rows = train(amclip, shared_dir, tmp_path / "run", method, *needed(amclip, shared_dir, tmp_path, method))
    loaded = config.load(f"{method}-tiny", words_of(method))
    terms = {name for name in rows[-1] if name.startswith("loss_")}
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)
    assert terms >= {f"loss_{name}" for name in RECORDED} and rows[-1]["loss_contrastive"] > 0
    kept = {group.masks[0][0].keep_ratio for group in method_of(loaded).groups(0.0)}
    whole = loaded.model.vision.grid**2
    assert (rows[-1]["kept_tokens"] == whole) == (kept == {1.0})
    assert any(row["step_applied"] for row in rows)


def test_ranks_whose_texts_differ_in_length_train_at_zero3(shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    """A rank that ran its text tower once more than another would wait for a gather that never comes."""
    rows = train(amclip, shared_dir, tmp_path / "run", "maskclip", "engine.deepspeed=zero3_fp32.json")
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_worlds_and_splits_agree(method: str, stage: int, shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    """1, 2 and 4 ranks, whole and in pieces: the losses of three steps within 1e-5 relative."""
    found, words = {}, needed(amclip, shared_dir, tmp_path, method)
    for ranks, per_gpu in ((1, 16), (1, 4), (2, 8), (2, 4), (4, 4), (4, 2)):
        rows = train(
            amclip,
            shared_dir,
            tmp_path / f"{ranks}x{per_gpu}",
            method,
            *words,
            f"batch.per_gpu={per_gpu}",
            f"engine.deepspeed=zero{stage}_fp32.json",
            ranks=ranks,
        )
        found[ranks, per_gpu] = [row["loss"] for row in rows]
    reference = found.pop((1, 16))
    for cell, losses in found.items():
        assert all(abs(a - b) <= 1e-5 * abs(a) for a, b in zip(reference, losses, strict=True)), cell


@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
def test_13_and_27_steps_are_40(method: str, shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    """Every recorded number of the last 27, bit for bit: centres, learned scales, word tables."""
    words = [*needed(amclip, shared_dir, tmp_path, method), "checkpoint.every_steps=13", "checkpoint.keep_last=9"]
    whole = train(amclip, shared_dir, tmp_path / "whole", method, *words, steps=40)
    saved = tmp_path / "whole" / "checkpoints" / "step_00000013"
    rest = train(amclip, shared_dir, tmp_path / "rest", method, *words, steps=40, options=("--resume", str(saved)))
    names = [name for name in whole[0] if name.startswith("loss") or name in ("step", "grad_norm", "logit_scale")]
    assert [[row[name] for name in names] for row in rest] == [[row[name] for name in names] for row in whole[13:]]
    assert len(rest) == 27


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_objective_begins_later_alike_at_every_stage(
    stage: int, shared_dir: Path, tmp_path: Path, amclip: Amclip
) -> None:
    """Before it begins its weights do not move, nor decay; against stage 0 in one process."""
    words = ["loss.patches.start=0.5", "optim.weight_decay=0.5", "optim.warmup_steps=0"]
    found = []
    for ranks, ds in ((1, 0), (2, stage)):
        rows = train(
            amclip,
            shared_dir,
            tmp_path / str(ds),
            "maskclip",
            *words,
            f"engine.deepspeed=zero{ds}_fp32.json",
            ranks=ranks,
            steps=8,
        )
        assert ["loss_patches" in row for row in rows] == [False] * 4 + [True] * 4
        assert [row["kept_tokens"] for row in rows] == [64] * 4 + [[64, 16]] * 4
        found.append([row["loss"] for row in rows])
    assert all(abs(a - b) <= 1e-4 * abs(a) for a, b in zip(*found, strict=True)), found


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_detailclips_prototypes_do_not_collapse(scenes: Path, tmp_path: Path, amclip: Amclip) -> None:
    """300 steps on scenes: the teacher's mean distribution keeps more than half of the entropy of all prototypes."""
    code, printed = amclip(
        "train",
        "detailclip-tiny",
        f"data.train={scenes}/train",
        f"run.out={tmp_path}/run",
        "run.steps=300",
        "batch.global_size=32",
        ranks=1,
        timeout_s=2000,
    )
    assert code == 0, printed
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["loss_detail_entropy"] > 0.5 and last["loss_detail_patch"] > 0  # docs/results/methods.md: not enough
