"""What differs between a checkpoint's run and the present one: shown, refused where it changes the mathematics."""

from dataclasses import replace

import pytest

from amclip_ds import config as settings
from amclip_ds.checkpoint import drift
from amclip_ds.errors import UserError

HASHES = {"data": "a" * 64, "tokenizer": "b" * 64}


def changes(*overrides: str, hashes: dict[str, str] = HASHES, precision: str = "float32") -> list[drift.Change]:
    old = settings.dump(settings.load("aclip-tiny"))
    new = settings.dump(settings.load("aclip-tiny", list(overrides)))
    return drift.changes_between(old, new, HASHES, hashes, "float32", precision)


def test_nothing_differs_from_itself() -> None:
    assert changes() == []


@pytest.mark.parametrize(
    "override",
    ["run.out=elsewhere", "batch.per_gpu=8", "engine.deepspeed=zero3_fp32.json", "checkpoint.keep_last=7",
     "log.every_steps=3", "data.workers=5", "run.time_limit=01:00:00", "eval.every_steps=9"],
)  # fmt: skip
def test_what_changes_no_number_is_shown_and_let_pass(override: str) -> None:
    found = changes(override)
    assert [change.key for change in found] == [override.split("=")[0]]
    assert drift.refuse_or_allow(found, []) == []


@pytest.mark.parametrize(
    "override",
    ["optim.lr=0.5", "run.seed=3", "run.steps=77", "batch.global_size=128", "mask.keep_ratio=0.25",
     "loss.o2e_weight=1.0", "teacher.momentum=0.9", "heads.output_dim=64", "compat=release", "optim.name=sgd",
     "guards.spike=skip"],
)  # fmt: skip
def test_what_changes_the_mathematics_is_refused_unless_named(override: str) -> None:
    key = override.split("=")[0]
    found = changes(override)
    with pytest.raises(UserError, match=rf"{key}: .* -> .*checkpoint.allow_drift=\[{key}\]"):
        drift.refuse_or_allow(found, ["optim.weight_decay"])
    assert [change.key for change in drift.refuse_or_allow(found, [key])] == [key]


def test_other_data_another_tokenizer_another_precision_are_refused() -> None:
    for hashes, precision, key in (
        (HASHES | {"data": "c" * 64}, "float32", "data.train"),
        (HASHES | {"tokenizer": "c" * 64}, "float32", "data.tokenizer"),
        (HASHES, "bfloat16", "engine.deepspeed"),
    ):
        found = changes(hashes=hashes, precision=precision)
        with pytest.raises(UserError, match=key):
            drift.refuse_or_allow(found, [])
        assert len(drift.refuse_or_allow(found, [key])) == 1


def test_every_free_key_exists() -> None:
    """A key that was renamed must not stay in the list of what is let pass."""
    known = settings.keys_and_types()
    for free in drift.FREE:
        assert any(key == free or key.startswith(free + ".") for key in known), free


def test_a_bomb_of_references_is_refused_soon() -> None:
    bomb = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)
    )
    with pytest.raises(UserError, match="unfolded"):
        drift.flatten(bomb)


def test_the_saved_key_decides_not_the_order() -> None:
    one = drift.Change("optim.lr", "1", "2", is_free=False)
    assert drift.refuse_or_allow([replace(one, is_free=True)], []) == []
