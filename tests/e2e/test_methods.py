"""Every method as a user types it, on two ranks over real pairs: it trains, and keeps what it says it keeps."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.jsonl import read_lines
from amclip_ds.method import method_of
from amclip_ds.objectives import RECORDED
from tests.e2e.conftest import Amclip
from tests.e2e.methods import METHODS, needed, pairs, train
from tests.harness import run_ranks
from tests.recipes import words_of


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


def test_distillation_stacks_on_aclip(shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    """The average that scores the patches and the finished teacher of the embeddings, in one step."""
    words = needed(amclip, shared_dir, tmp_path, "clipkd")
    rows = train(amclip, shared_dir, tmp_path / "run", "aclip", "loss.clipkd.weight=1", *words)
    named = {"loss_o2o", "loss_o2e", "loss_contrastive", "loss_kd_feature"}
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows), rows
    assert named <= rows[-1].keys(), rows[-1].keys()


def test_ranks_whose_texts_differ_in_length_train_at_zero3(shared_dir: Path, tmp_path: Path, amclip: Amclip) -> None:
    """A rank that ran its text tower once more than another would wait for a gather that never comes."""
    rows = train(amclip, shared_dir, tmp_path / "run", "maskclip", "engine.deepspeed=zero3_fp32.json")
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)


def test_a_loss_of_means_over_samples_alone_trains_in_pieces(shared_dir: Path, tmp_path: Path) -> None:
    """Its gradient comes from the pieces; the batch as a whole has none."""
    words = ["maskclip-tiny", f"data.train={pairs(shared_dir)}", f"run.out={tmp_path}", "run.steps=1"]
    words += ["batch.global_size=16", "loss.contrastive_weight=0", "loss.mlm.weight=0"]
    runs = [[*words, f"batch.per_gpu={size}"] for size in (16, 4)]
    (whole, _), (pieces, gradient) = run_ranks("tests.e2e.short_runs:steps_of", runs=runs, folder=str(tmp_path))[0]
    assert worst(whole, pieces)[1] <= 1e-5 and gradient <= 1e-5 and whole[0][1] > 0


WORLDS = {1: (16, 4), 2: (8, 4), 4: (4, 2)}  # ranks -> samples that each holds at a time: its batch, and pieces of it
Steps = dict[tuple[str, int, int], tuple[list[tuple[float, float]], float]]


@pytest.fixture(scope="module")
def steps(
    words: Callable[[str], list[str]], shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Steps]:
    """Of a stage: method, ranks, samples at a time -> (loss, gradient norm) of three steps, and how far the first
    gradients are from those of one rank with its batch whole."""

    @functools.cache
    def of(stage: int) -> Steps:
        found: Steps = {}
        folder = tmp_path_factory.mktemp("steps")
        common = [f"data.train={pairs(shared_dir)}", f"run.out={folder}", "run.steps=3"]
        common += ["batch.global_size=16", f"engine.deepspeed=zero{stage}_fp32.json"]
        for ranks, sizes in WORLDS.items():
            cells = [(method, ranks, size) for method in METHODS for size in sizes]
            runs = [[f"{method}-tiny", *common, *words(method), f"batch.per_gpu={size}"] for method, _, size in cells]
            case = "tests.e2e.short_runs:steps_of"
            results = run_ranks(case, world_size=ranks, timeout_s=1800, runs=runs, folder=str(folder))
            found |= dict(zip(cells, results[0], strict=True))
        return found

    return of


@pytest.mark.nightly
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_worlds_and_splits_agree(method: str, stage: int, steps: Callable[[int], Steps]) -> None:
    """1, 2 and 4 ranks, whole and in pieces: losses and gradient norms of three steps within 1e-5 relative, and every
    element of the first step's gradients within 1e-5 of its tensor's largest."""
    found = {cell[1:]: made for cell, made in steps(stage).items() if cell[0] == method}
    reference, itself = found.pop((1, 16))
    assert len(found) == 5 and len(reference) == 3 and all(math.isfinite(loss) for loss, _ in reference)
    assert itself == 0.0
    apart = {cell: (*worst(reference, rows), gradient) for cell, (rows, gradient) in found.items()}
    loss, norm, gradient = (max(numbers) for numbers in zip(*apart.values()))
    print(f"{method} at stage {stage}: loss {loss:.1e} norm {norm:.1e} gradients {gradient:.1e}")
    assert max(loss, norm, gradient) <= 1e-5, apart


def worst(reference: list[tuple[float, float]], rows: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest relative difference of a loss, and of a gradient norm."""
    loss, norm = (
        max(abs(a - b) / abs(a) for a, b in zip(*numbers, strict=True)) for numbers in zip(zip(*reference), zip(*rows))
    )
    return loss, norm


@pytest.mark.nightly
@pytest.mark.timeout(2600)
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


def test_where_an_objective_begins_the_loss_leaps_and_is_no_spike(
    shared_dir: Path, tmp_path: Path, amclip: Amclip
) -> None:
    """Under guards.spike=skip every step from there on would be refused, until the run stops itself."""
    guards = ["guards.spike=skip", "guards.spike_window=3", "guards.max_skipped=2", "guards.spike_deviations=100"]
    words = ["loss.patches.start=0.5", "loss.patches.weight=50", *guards]
    rows = train(amclip, shared_dir, tmp_path / "run", "maskclip", *words, steps=8)
    losses = [row["loss"] for row in rows]
    assert len(losses) == 8 and min(losses[4:]) > 3 * max(losses[:4])
    assert not [row for row in read_lines(tmp_path / "run" / "incidents.jsonl") if "spike" in row["kind"]]


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
