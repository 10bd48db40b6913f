"""Operations and bytes of a step: the formulas against torch's own count and what autograd really keeps."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from amclip_ds import config
from amclip_ds.model.amclip import AClip
from amclip_ds.model.features import StudentInputs, ViewGroup
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.plan import work

B = 4
SMALL = ["model.text.vocab_size=200", "model.text.eos_token_id=199", "data.train=x", f"batch.global_size={B}"]


def of_recipe(recipe: str, *words: str) -> work.Work:
    return work.work_of(config.load(recipe, [*SMALL, *words]), 1)


def inputs_of(step: work.Work, device: str) -> StudentInputs:
    side, (kept, *_) = step.config.model.vision.image_size, step.views
    views = len(step.views)
    images = torch.zeros(views, B, 3, side, side, device=device)
    keep = torch.arange(kept, device=device).expand(views * B, kept) if kept < step.grid**2 else None
    tokens = torch.full((B, step.text_tokens), 199, device=device)
    return StudentInputs((ViewGroup(tuple(range(views)), images, (), keep),), {"plain": tokens})


PLAIN = ["engine.savings.last_block=false", "engine.savings.patchify=false"]


@pytest.mark.parametrize("words", [[], PLAIN], ids=["saving", "plain"])
@pytest.mark.parametrize("recipe", ["aclip-tiny", "clip-tiny", "aclip-vitb16", "flip-vitl16"])
def test_operations_are_those_that_torch_counts(recipe: str, words: list[str]) -> None:
    step = of_recipe(recipe, "model.vision.checkpoint_every=0", *words)
    with torch.device("meta"):
        module = AClip(step.config.model, savings=step.config.engine.savings)
        counter = FlopCounterMode(display=False)
        with counter:
            encoded = module.encode(inputs_of(step, "meta"), {})
            (module.image_projection(encoded.cls).sum() + module.text_projection(encoded.eot["plain"]).sum()).backward()
    flops = work.flops_of(step)
    # On the meta device attention is not fused: its backward is counted as twice the forward's products.
    attention = sum(
        work.blocks_forward(w, h, d, t, pooled=not words)[1]
        for w, h, d, t in [(step.tower.width, step.tower.hidden, step.tower.depth, 1 + k) for k in step.views]
        + [(step.config.model.text.width, 0, step.config.model.text.depth, step.text_tokens)]
    )
    assert flops.vision + flops.text == pytest.approx(counter.get_total_flops() + 0.5 * B * attention, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "ratio"),
    [("slip", 2.71), ("maskclip", 1.87), ("detailclip", 1.84), ("siglip", 1.0), ("flip", 0.57), ("clipa-pre", 0.24)],
)
def test_operations_against_clips_are_the_published_designs(recipe: str, ratio: float) -> None:
    """At B/16, without the exact saving of the last block, which the counts behind these ratios do not have."""
    clip, other = (
        work.flops_of(work.work_of(config.load(f"{name}-vitb16", ["engine.savings.last_block=false"]), 64))
        for name in ("clip", recipe)
    )
    assert other.model / clip.model == pytest.approx(ratio, rel=0.05)


def test_a_frozen_teacher_counts_where_its_run_is_there(tmp_path: Path) -> None:
    """CLIP-KD with a B/16 teacher is 1.33 of CLIP, its weights are on every rank; without its run there is no MFU."""
    (tmp_path / "config.yaml").write_text(config.dump(config.load("clip-vitb16")))
    words = [f"distill.teacher={tmp_path}", "engine.savings.last_block=false"]
    taught = work.work_of(config.load("clipkd-vitb16", words), 64)
    clip = work.work_of(config.load("clip-vitb16", words[1:]), 64)
    assert work.flops_of(taught).model / work.flops_of(clip).model == pytest.approx(1.33, rel=0.05)
    student = sum(parameter.numel() for parameter in clip.student.values())
    assert work.frozen_bytes(taught) == 4 * student and work.frozen_bytes(clip) == 0
    student_of_half = work.work_of(config.load("clipkd-vitb16", [*words, "model.vision.image_size=112"]), 64)
    assert work.flops_of(student_of_half).teacher == work.flops_of(taught).teacher  # it sees views at its own size
    assert work.operations(config.load("clipkd-vitb16", words), 64) is not None
    assert work.operations(config.load("clipkd-vitb16", ["distill.teacher=/another/model"]), 64) is None


def test_the_teacher_that_sees_views_has_no_crop_and_looks_at_each() -> None:
    detail, aclip = of_recipe("detailclip-vitb16", "data.workers=0"), of_recipe("aclip-vitb16", *PLAIN)
    assert work.input_bytes(detail)["images"] == B * 2 * 3 * 224**2 < work.input_bytes(aclip)["images"]
    assert work.flops_of(detail).teacher > 2 * work.flops_of(aclip).teacher


def test_the_next_batch_is_on_the_device_too_where_workers_make_it() -> None:
    alone, ahead = (work.input_bytes(of_recipe("aclip-vitb16", f"data.workers={n}")) for n in (0, 4))
    assert ahead["images"] == 2 * alone["images"] == 2 * B * 3 * 3 * 224**2
    assert ahead["photometric"] == alone["photometric"]


@pytest.mark.parametrize("words", [[], PLAIN], ids=["saving", "plain"])
def test_the_teachers_operations(words: list[str]) -> None:
    step = of_recipe("aclip-vitb16", *words)
    with torch.device("meta"), torch.no_grad():
        module = TeacherModel(step.config.model, savings=step.config.engine.savings)
        counter = FlopCounterMode(display=False)
        with counter:
            module.vision(torch.zeros(B, 3, 224, 224), with_scores=True, cls_only=True)
    assert work._teacher_forward(step) * B == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.text.activation=quick_gelu"],
        ["model.vision.checkpoint_every=1"],
        ["model.vision.freeze_patch_embed=false"],
        ["engine.savings.last_block=false", "engine.savings.patchify=false"],
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(words: list[str]) -> None:
    step = of_recipe("aclip-tiny", *words)
    torch.manual_seed(0)
    module = AClip(step.config.model, savings=step.config.engine.savings)
    held = {parameter.untyped_storage()._cdata: 0 for parameter in module.parameters()}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            held[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        encoded = module.encode(inputs_of(step, "cpu"), {})
    assert encoded.cls.requires_grad
    measured = sum(held.values())
    assert work.activations_of(step).towers == pytest.approx(measured, rel=0.08), measured


def test_short_texts_and_two_passes_over_texts() -> None:
    plain = work.flops_of(of_recipe("clip-vitb16"))
    short = of_recipe("clip-vitb16", "data.text_mask.strategy=truncate", "data.text_mask.tokens=16")
    assert short.text_tokens == 16 and work.flops_of(short).text < 0.25 * plain.text
    both = config.load("clip-vitb16", [*SMALL, "data.text_mask.strategy=truncate", "data.text_mask.tokens=16"])
    both.loss.text = "plain"  # as for an objective of one's own that reads the short ones
    whole = work.work_of(both, 1)
    assert whole.text_tokens == 77 and work.flops_of(whole) == plain
    twice = work.flops_of(dataclasses.replace(whole, texts=(False, False)))
    assert twice.text == pytest.approx(2 * plain.text, rel=1e-3) and twice.vision == plain.vision


def test_the_pass_of_hidden_words_reads_every_token_and_the_other_one() -> None:
    """The towers' part of it against torch's own count is test_operations_are_those_that_torch_counts'."""
    plain, mlm = (of_recipe("clip-vitb16", *words) for words in ([], ["loss.mlm.weight=0.05"]))
    assert plain.texts == (False,) and mlm.texts == (False, True)
    whole = work.flops_of(of_recipe("clip-vitb16", "engine.savings.last_block=false"))
    assert work.flops_of(mlm).text == pytest.approx(work.flops_of(plain).text + whole.text, rel=1e-3)
    late = work.operations(config.load("clip-tiny", [*SMALL, "loss.mlm.weight=0.05", "loss.mlm.start=0.5"]), 1)
    clip = work.operations(config.load("clip-tiny", SMALL), 1)
    assert late is not None and clip is not None and late(64, 16.0, 0.4) == clip(64, 16.0, 0.4) < late(64, 16.0, 0.5)


def test_recomputation_and_accumulation_cost_forwards() -> None:
    plain = work.flops_of(of_recipe("aclip-vitb16"))
    recomputed = work.flops_of(of_recipe("aclip-vitb16", "model.vision.checkpoint_every=1"))
    split = work.flops_of(of_recipe("aclip-vitb16", "batch.per_gpu=2"))
    assert plain.again == 0 and recomputed.model == plain.model == split.model
    assert 0.3 * plain.vision < recomputed.again < 0.34 * plain.vision
    assert split.again > recomputed.again


def test_what_cannot_be_counted_has_no_operations() -> None:
    config_of = config.load("aclip-tiny", [*SMALL, "model.vision.name=no_such_vit", "model.vision.patch_size=8"])
    assert work.operations(config_of, 1) is None
    count = work.operations(config.load("aclip-tiny", SMALL), 1)
    assert count is not None and count(32, 16.0, 0) > count(16, 16.0, 0) > count([16, 8], 16.0, 0) > count(
        [16, 8], 8.0, 0
    )


def test_what_begins_later_costs_nothing_before() -> None:
    late = work.operations(config.load("maskclip-tiny", [*SMALL, "loss.mlm.weight=0", "loss.patches.start=0.8"]), 1)
    whole = work.operations(config.load("maskclip-tiny", [*SMALL, "loss.mlm.weight=0"]), 1)
    clip = work.operations(config.load("clip-tiny", SMALL), 1)
    assert late is not None and whole is not None and clip is not None
    assert late(64, 16.0, 0.79) == pytest.approx(clip(64, 16.0, 0.79), rel=0.01)
    assert late([64, 16], 16.0, 0.8) == whole([64, 16], 16.0, 0.0) > 1.3 * late(64, 16.0, 0.0)


def test_a_runs_mean_follows_schedules_and_starts() -> None:
    """Twin: where nothing changes, it is the step's own number, to the bit."""
    words = ["mask.keep_ratio=0.5", "mask.schedule=linear", "mask.final_keep_ratio=0.25"]
    falling = of_recipe("random2x-tiny", *words)
    count = work.operations(falling.config, 1)
    assert count is not None
    ratios = [0.5 - 0.25 * stage / 7 for stage in range(8)]
    stages = [count(math.ceil(64 * ratio - 1e-9), 77.0, stage / 8) for stage, ratio in enumerate(ratios)]
    assert work.mean_operations(falling) == pytest.approx(sum(stages) / 8)
    assert work.mean_operations(falling) < 0.95 * work.flops_of(falling).model
    rising = of_recipe("random2x-tiny", words[1], "mask.keep_ratio=0.25", "mask.final_keep_ratio=0.5")
    assert work.mean_operations(rising) == pytest.approx(work.mean_operations(falling))

    late = of_recipe("maskclip-tiny", "loss.mlm.weight=0", "loss.patches.start=0.8")
    count = work.operations(late.config, 1)
    assert count is not None
    after = count(list(late.views), 77.0, 0.8)
    assert after == work.flops_of(late).model
    assert work.mean_operations(late) == pytest.approx(0.8 * count(64, 77.0, 0.0) + 0.2 * after)
    for recipe in ("clip-tiny", "aclip-tiny", "maskclip-tiny"):
        assert work.mean_operations(of_recipe(recipe)) == work.flops_of(of_recipe(recipe)).model
