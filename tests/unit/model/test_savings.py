"""Each saving against the forward without any, in fp64: features, kept tokens, scores and every gradient."""

import dataclasses

import pytest
import torch
from torch import Tensor

from amclip_ds.masks import MaskConfig, MaskInputs
from amclip_ds.masks.selection import Selection
from amclip_ds.model.savings import PLAIN, Savings
from amclip_ds.model.text import TextTower
from amclip_ds.model.text_groups import groups_of
from amclip_ds.model.text_layer import TextLayer
from amclip_ds.model.vision import VisionTower
from tests.unit.model import tiny
from tests.unit.model.test_text import texts

NAMES = [field.name for field in dataclasses.fields(Savings)]
NEEDS = {"one_write": {"patchify": True}}
EACH = [dataclasses.replace(PLAIN, **{name: True} | NEEDS.get(name, {})) for name in NAMES] + [Savings()]
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LENGTHS = (4, 16, 7, 5, 16, 12, 4, 9)
TEXTS = texts(LENGTHS)


def named(savings: Savings) -> str:
    return "+".join(name for name in NAMES if getattr(savings, name))


def filled(tower: VisionTower | TextTower) -> VisionTower | TextTower:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return tower.double()


def selection(strategy: str) -> tuple[Selection, ...]:
    if strategy == "none":
        return ()
    noise = torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    return (Selection(MaskConfig(strategy, 0.5, unit=2), MaskInputs(4, 2, 2, noise=noise, scores=noise)),)


def seen(
    savings: Savings, strategy: str = "random", scores: bool = False, cls_only: bool = True, **changes: object
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor | None]]:
    """What the image tower gives, and its gradients."""
    tower = filled(VisionTower(tiny.vision_config(**changes), savings))
    output = tower(IMAGES, selection(strategy), with_scores=scores, cls_only=cls_only)
    loss = (output.cls * torch.arange(32.0)).sum()
    if not cls_only:
        loss = loss + output.tokens.square().sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    return output.cls, output.keep_indices, output.scores, gradients


def assert_equal(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    for own, plain in zip(found[1:3], expected[1:3]):
        assert (own is None) == (plain is None)
        if own is not None:
            torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)  # scores are fp32
    assert found[3].keys() == expected[3].keys()
    for name, gradient in expected[3].items():
        assert (found[3][name] is None) == (gradient is None), name
        if gradient is not None:
            largest = float(gradient.abs().max())
            torch.testing.assert_close(found[3][name], gradient, rtol=0, atol=1e-10 * max(1, largest), msg=name)


@pytest.mark.parametrize("savings", EACH, ids=named)
@pytest.mark.parametrize("strategy", ["none", "random", "attentive"])
def test_of_the_image_tower(savings: Savings, strategy: str) -> None:
    assert_equal(seen(savings, strategy), seen(PLAIN, strategy))


@pytest.mark.parametrize(
    "changes",
    [
        {"freeze_patch_embed": False},
        {"checkpoint_every": 1},
        {"checkpoint_every": 2},
        {"scores": True},
        {"cls_only": False},
        {"strategy": "none", "scores": True},
    ],
    ids=str,
)
def test_all_of_them_in_every_kind_of_tower(changes: dict[str, object]) -> None:
    assert_equal(seen(Savings(), **changes), seen(PLAIN, **changes))


def test_patches_alone_do_not_need_every_patch() -> None:
    """Rows of the patch product: those that stay and the class token's, not all 16."""
    rows = []
    tower = filled(VisionTower(tiny.vision_config()))
    tower.patch_embed.proj.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    tower(IMAGES, selection("random"))
    tower(IMAGES)
    assert rows == [1 + 8, 1 + 16]


def test_a_mask_that_reads_patches_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from amclip_ds import masks

    look = masks.Mask(lambda inputs, options: inputs.patches.square().sum(-1), needs=frozenset({"patches"}))
    monkeypatch.setitem(masks.MASKS, "look", look)
    chosen = []
    for savings in (Savings(), PLAIN):
        tower = filled(VisionTower(tiny.vision_config(), savings))
        given = Selection(MaskConfig("look", 0.5, unit=1), MaskInputs(4, 1, 2))
        chosen.append(tower(IMAGES, (given,), cls_only=True))
    assert torch.equal(chosen[0].keep_indices, chosen[1].keep_indices)
    torch.testing.assert_close(chosen[0].cls, chosen[1].cls)


def test_the_last_block_multiplies_one_token() -> None:
    """The twin: with the saving off, or with patches asked for, the last block's MLP takes all."""
    for savings, cls_only, tokens in ((Savings(), True, 1), (Savings(), False, 17), (PLAIN, True, 17)):
        tower = filled(VisionTower(tiny.vision_config(), savings))
        shapes: list[torch.Size] = []
        tower.blocks[-1].mlp.register_forward_hook(lambda _, args, output, shapes=shapes: shapes.append(output.shape))
        tower(IMAGES, cls_only=cls_only)
        assert shapes == [(6, tokens, 32)]


def read(savings: Savings, token_ids: Tensor = TEXTS, **changes: object) -> tuple:
    tower = filled(TextTower(tiny.text_config(**changes), savings))
    feature = tower(token_ids, LENGTHS)
    (feature * torch.arange(32.0)).sum().backward()
    return feature, None, None, {name: parameter.grad for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("savings", EACH, ids=named)
def test_of_the_text_tower(savings: Savings) -> None:
    assert_equal(read(savings), read(PLAIN))


@pytest.mark.parametrize("every", [1, 2])
def test_of_a_text_tower_that_recomputes(every: int) -> None:
    assert_equal(read(Savings(), checkpoint_every=every), read(PLAIN))


def test_a_wrong_end_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the text test: a query that sees one token more than the end gives another feature."""
    plain = read(PLAIN)[0]
    run = TextLayer._at
    monkeypatch.setattr(TextLayer, "_at", lambda layer, x, end: run(layer, x, end - 1))
    assert not torch.allclose(read(Savings())[0], plain)


def test_texts_of_like_length_are_taken_together() -> None:
    groups = groups_of(LENGTHS, 16)
    assert sorted(row for group in groups for row in group.rows) == list(range(8))
    assert [(len(group.rows), group.length) for group in groups] == [(4, 8), (4, 16)]
    assert all(LENGTHS[row] <= group.length for group in groups for row in group.rows)
    assert len(groups_of((16,) * 8, 16)) == 1  # nothing to save
    assert len(groups_of(LENGTHS[:7], 16)) == 1  # not in equal parts
    assert [len(group.rows) for group in groups_of(LENGTHS, 16, fixed_shapes=True)] == [2, 2, 2, 2]
    assert groups_of((9,) * 8, 77, fixed_shapes=True) == [(list(range(8)), 16)]  # alike: one, of what they need
    assert groups_of((40,) * 4 + (77,) * 4, 77)[-1].length == 77  # never beyond the context
