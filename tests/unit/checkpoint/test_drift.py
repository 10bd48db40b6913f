"""What differs between a checkpoint's run and the present one: shown, refused where it changes training results."""

import re

import pytest

from amclip_ds import config as settings
from amclip_ds.checkpoint import drift
from amclip_ds.errors import UserError

MATHEMATICS = {
    *("compat", "run.steps", "run.epochs", "run.seed", "batch.global_size"),
    *("model.embed_dim", "model.text.activation", "model.text.context_length", "model.text.depth"),
    *(
        "model.text.eos_token_id",
        "model.text.heads",
        "model.text.mlp_ratio",
        "model.text.vocab_size",
        "model.text.width",
    ),
    *("model.vision.depth", "model.vision.freeze_patch_embed", "model.vision.heads", "model.vision.image_size"),
    *("model.vision.mlp_ratio", "model.vision.name", "model.vision.patch_size", "model.vision.position_init"),
    *("model.vision.width", "mask.keep_ratio", "mask.strategy", "mask.unit"),
    *("heads.hidden_dim", "heads.norm", "heads.norm_momentum", "heads.output_dim"),
    *("loss.contrastive_weight", "loss.kind", "loss.o2e_weight", "loss.o2o_temperature", "loss.o2o_weight"),
    *(
        "teacher.always",
        "teacher.final_momentum",
        "teacher.momentum",
        "teacher.resolution",
        "teacher.sees",
        "teacher.view",
    ),
    *("optim.betas", "optim.clip_grad_norm", "optim.eps", "optim.final_lr", "optim.layer_decay", "optim.lr"),
    *("optim.momentum", "optim.name", "optim.text_lr_scale", "optim.vision_lr_scale", "optim.warmup_start_lr"),
    *("optim.warmup_steps", "optim.weight_decay", "guards.spike", "guards.spike_deviations", "guards.spike_window"),
    *(
        "data.keep_colours",
        "data.caption_per_line",
        "data.captions",
        "data.colours",
        "heads.norm_by",
        "loss.release",
        "model.vision.pool",
        "data.exclude",
        "data.max_pixels",
        "data.num_views",
        "data.open_shards",
    ),
    *("data.photometric", "data.resampled", "data.shuffle_window", "data.views", "data.weights", "plugins"),
    *("mask.final_keep_ratio", "mask.schedule", "data.text_mask.strategy", "data.text_mask.tokens"),
    *("data.text_mask.threshold", "distill.teacher"),
    "engine.fp8",
    *("loss.text", "loss.views", "loss.o2o_views", "loss.o2e_views"),
}
"""Keys of which another value gives another training; drift.FREE has those that do not."""
HASHES = {"data": "a" * 64, "tokenizer": "b" * 64, "words": "d" * 64}


def changes(*overrides: str, hashes: dict[str, str] = HASHES, precision: str = "float32") -> list[drift.Change]:
    old = settings.dump(settings.load("aclip-tiny"))
    new = settings.dump(settings.load("aclip-tiny", list(overrides)))
    return drift.changes_between(old, new, HASHES, hashes, "float32", precision)


def test_nothing_differs_from_itself() -> None:
    assert changes() == []


@pytest.mark.parametrize(
    "override",
    [
        "run.out=elsewhere",
        "batch.per_gpu=8",
        "engine.deepspeed=zero3_fp32.json",
        "checkpoint.keep_last=7",
        "log.every_steps=3",
        "data.stage_dir=/tmp/job7",
        "data.timeout_s=60.0",
        "data.stage_gb=1.0",
        "loss.chunk=64",
        "data.text_bucket=0",
        "data.workers=5",
        "run.time_limit=01:00:00",
        "eval.every_steps=9",
    ],
)
def test_what_changes_no_number_is_shown_and_let_pass(override: str) -> None:
    found = changes(override)
    assert [change.key for change in found] == [override.split("=")[0]]
    assert drift.refuse_or_allow(found, []) == []


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=0.5",
        "run.seed=3",
        "run.steps=77",
        "batch.global_size=128",
        "mask.keep_ratio=0.25",
        "loss.o2e_weight=1.0",
        "teacher.momentum=0.9",
        "heads.output_dim=64",
        "compat=release",
        "optim.name=sgd",
        "guards.spike=skip",
    ],
)
def test_what_changes_training_results_is_refused_unless_named(override: str) -> None:
    key = override.split("=")[0]
    found = changes(override)
    with pytest.raises(UserError, match=rf"{key}: .* -> .*checkpoint.allow_drift=\[{key}\]"):
        drift.refuse_or_allow(found, ["optim.weight_decay"])
    assert [change.key for change in drift.refuse_or_allow(found, [key])] == [key]


def test_other_data_another_tokenizer_other_words_another_precision_are_refused() -> None:
    for hashes, precision, key in (
        (HASHES | {"data": "c" * 64}, "float32", "data.train"),
        (HASHES | {"tokenizer": "c" * 64}, "float32", "data.tokenizer"),
        (HASHES | {"words": "c" * 64}, "float32", "data.text_mask.table"),
        (HASHES | {"words": "c" * 64}, "float32", "data.text_mask.table"),
        (HASHES, "bfloat16", "engine.deepspeed"),
    ):
        found = changes(hashes=hashes, precision=precision)
        with pytest.raises(UserError, match=key):
            drift.refuse_or_allow(found, [])
        assert len(drift.refuse_or_allow(found, [key])) == 1


def test_every_key_is_either_free_or_numeric() -> None:
    """A new key is classified before it is used; one that was renamed stays in neither list."""
    of_parts = re.compile(r"(mask|loss)\.\w+\..+")  # the options of masks and objectives: numeric, all of them
    known = {key for key in settings.keys_and_types() if not of_parts.fullmatch(key)}
    in_free_sections = {key for key in known if key.partition(".")[0] in drift.FREE_SECTIONS}
    assert not drift.FREE & MATHEMATICS
    assert known == drift.FREE | MATHEMATICS | in_free_sections
    assert not [key for key in MATHEMATICS if drift.is_free(key)] and all(map(drift.is_free, known - MATHEMATICS))


def test_a_key_that_the_saved_run_did_not_know_yet_means_its_default() -> None:
    """Or no run could resume with a version that has one key, mask or plug-in more. Twin: another value is refused."""
    defaults = settings.dump(settings.TrainConfig())
    old = settings.dump(settings.load("aclip-tiny")).replace("  unit: 2\n", "").replace("  o2e_weight: 2.0\n", "")
    for word, differs in (
        ("mask.unit=2", []),
        ("mask.unit=4", ["mask.unit"]),
        ("loss.o2e_weight=1", ["loss.o2e_weight"]),
    ):
        new = settings.dump(settings.load("aclip-tiny", [word]))
        found = drift.changes_between(old, new, HASHES, HASHES, "float32", "float32", default_config=defaults)
        assert [change.key for change in found] == differs, word


def test_a_list_of_sections_is_compared_item_by_item() -> None:
    one, other = (drift.flatten(f"data: {{views: [{{}}, {{scale: 1, flip: {flip}}}]}}") for flip in ("true", "false"))
    assert [change.key for change in drift.compare(one, other)] == ["data.views.1.flip"]
    assert not drift.compare(one, one)


def test_a_view_that_is_written_out_is_the_view_that_was_left_out() -> None:
    assert changes("data.views=[{},{}]") == []
    assert [str(change) for change in changes("data.views.1.mask.keep_ratio=0.25")] == [
        "data.views.1.mask.keep_ratio: (absent) -> 0.25"
    ]
    assert [change.key for change in changes("data.views=[{},{},{}]", "loss.o2o_weight=0")] == [
        "data.num_views",
        "loss.o2o_weight",
    ]


def test_a_bomb_of_references_is_refused_soon() -> None:
    bomb = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)
    )
    with pytest.raises(UserError, match="unfolded"):
        drift.flatten(bomb)


def test_a_free_change_is_let_pass_beside_an_allowed_one_and_not_recorded() -> None:
    free, numeric = (
        drift.Change("data.workers", "1", "2", is_free=True),
        drift.Change("optim.lr", "1", "2", is_free=False),
    )
    assert drift.refuse_or_allow([free, numeric], ["optim.lr"]) == [numeric]
    with pytest.raises(UserError, match="optim.lr: 1 -> 2") as refused:
        drift.refuse_or_allow([free, numeric], [])
    assert "data.workers" not in str(refused.value)


def test_what_allows_a_change_is_named() -> None:
    other = changes(hashes=HASHES | {"data": "c" * 64})
    assert drift.allowances([], "refuse") == {"data.exclude": "data.exclude"}  # of its own accord
    for named, on_change, by in (
        ([], "report", "data.on_change=report"),
        (["data.train"], "refuse", "checkpoint.allow_drift"),
        (["data.train", "optim.lr"], "report", "checkpoint.allow_drift"),
    ):
        allowed = drift.allowances(named, on_change)
        assert [allowed[change.key] for change in drift.refuse_or_allow(other, allowed)] == [by]
    with pytest.raises(UserError, match="optim.lr"):
        drift.refuse_or_allow(changes("optim.lr=0.5"), drift.allowances([], "report"))
