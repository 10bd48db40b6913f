import pytest
import torch
from torch import Tensor

from amclip_ds import masks
from amclip_ds.errors import UserError
from amclip_ds.masks import MASKS, Mask, MaskConfig, MaskInputs, needs_of
from amclip_ds.masks.selection import Selection, choose, keep_tokens, pixels_of, select, tokens_of_units
from amclip_ds.masks.units import num_kept, num_kept_units, num_units, pool


def chosen(config: MaskConfig, grid: int, scores: Tensor | None = None, noise: Tensor | None = None) -> Tensor | None:
    """Of one view."""
    return select(config, MaskInputs(grid, config.unit, 1, noise=noise, scores=scores))


@pytest.mark.parametrize(("ratio", "tokens"), [(0.25, 52), (0.3, 60), (0.5, 100), (0.75, 148), (0.9, 180), (1.0, 196)])
def test_kept_tokens_of_the_paper(ratio: float, tokens: int) -> None:
    assert num_kept(MaskConfig(keep_ratio=ratio), grid=14) == tokens
    if ratio < 1:
        assert tokens == 4 * (int(49 * ratio) + 1)


def test_kept_tokens_elsewhere() -> None:
    assert num_kept(MaskConfig(keep_ratio=0.5), grid=8) == 32  # 8 of 16 blocks
    assert num_kept(MaskConfig(strategy="random", keep_ratio=0.5, unit=1), grid=14) == 98  # FLIP
    assert num_kept(MaskConfig(strategy="none"), grid=14) == 196
    assert num_kept_units(30, 0.1) == 3  # 0.1 * 30 is a little above 3 in floating point
    assert num_kept_units(4, 0.01) == 1


def test_attentive_keeps_the_best_units_as_blocks_of_tokens() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.5, 0.1, 0.2, 0.6]])
    keep = chosen(MaskConfig(keep_ratio=0.5), grid=4, scores=scores)
    assert keep.tolist() == [[2, 3, 6, 7, 8, 9, 12, 13], [0, 1, 4, 5, 10, 11, 14, 15]]


def test_inverse_keeps_what_attentive_removes() -> None:
    scores = torch.rand(3, 49, generator=torch.Generator().manual_seed(0))
    best = chosen(MaskConfig(keep_ratio=24 / 49), grid=14, scores=scores)
    worst = chosen(MaskConfig(strategy="attentive_inverse", keep_ratio=25 / 49), grid=14, scores=scores)
    for row in range(3):
        assert sorted(best[row].tolist() + worst[row].tolist()) == list(range(196))


def test_random_keeps_the_smallest_draws_and_nothing_else_is_random() -> None:
    noise = torch.rand(10, 196, generator=torch.Generator().manual_seed(1))
    config = MaskConfig(strategy="random", unit=1)
    keep = chosen(config, grid=14, noise=noise)
    assert keep.shape == (10, 98)
    assert torch.equal(keep, noise.argsort(dim=-1)[..., :98].sort(dim=-1).values)
    torch.manual_seed(7)
    assert torch.equal(keep, chosen(config, grid=14, noise=noise))
    assert not torch.equal(keep, chosen(config, grid=14, noise=noise.flip(-1)))


def test_equal_scores_keep_the_first_units() -> None:
    keep = chosen(MaskConfig(keep_ratio=0.5), grid=8, scores=torch.zeros(1, 16))
    assert keep.tolist() == [list(range(32))]


def test_none_keeps_everything() -> None:
    assert chosen(MaskConfig(strategy="none"), grid=14) is None


@pytest.mark.parametrize("unit", [1, 2, 3, 6])
def test_units_tile_the_grid(unit: int) -> None:
    tokens = tokens_of_units(torch.arange((6 // unit) ** 2), 6, unit)
    assert sorted(tokens.tolist()) == list(range(36))


def test_the_tokens_that_are_kept_are_gathered() -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    keep = torch.tensor([[0, 2], [1, 3]])
    assert torch.equal(keep_tokens(x, keep), torch.stack([x[0, [0, 2]], x[1, [1, 3]]]))
    assert keep_tokens(x, None) is x


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"keep_ratio": 0.0}, "mask.keep_ratio"),
        ({"keep_ratio": 1.5}, "mask.keep_ratio"),
        ({"unit": 0}, "mask.unit"),
        ({"strategy": "attentiv"}, "mask.strategy"),
    ],
)
def test_refuses(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        MaskConfig(**changes)


def test_refuses_a_unit_that_does_not_divide_the_grid() -> None:
    with pytest.raises(ValueError, match=r"mask\.unit: 3 does not divide .* 14 x 14; set it to 1, or another"):
        num_kept(MaskConfig(unit=3), grid=14)


@pytest.mark.parametrize(
    ("gives", "complaint"),
    [
        (lambda inputs: inputs.noise[:, :3], r"shape \[2, 3\]; one a unit is needed, \[2, 16\]"),
        (lambda inputs: inputs.noise[:1], r"shape \[1, 16\]"),
        (lambda inputs: 3, "gave a int, not a tensor"),
    ],
)
def test_a_mask_that_gives_something_else_is_refused(
    gives: object, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MASKS, "odd", Mask(lambda inputs, options: gives(inputs), frozenset({"noise"})))  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"mask\.strategy: odd {complaint}|{complaint}"):
        chosen(MaskConfig("odd"), grid=8, noise=torch.rand(2, 16))


def test_a_mask_may_ask_only_for_what_there_is() -> None:
    with pytest.raises(ValueError, match="a mask cannot have depth; there are noise"):
        Mask(lambda inputs, options: inputs.noise, frozenset({"depth"}))
    assert needs_of(MaskConfig("none")) == frozenset() and needs_of(MaskConfig("attentive")) == {"scores"}


def test_a_mask_sees_its_views_patches_and_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each patch's pixels row by row, the channel fastest; what it did not ask for is None."""
    seen: list[MaskInputs] = []

    def priority(inputs: MaskInputs, options: object) -> Tensor:
        seen.append(inputs)
        assert inputs.pixels is not None
        return pool(inputs.pixels.mean(-1), inputs.grid, inputs.unit)

    monkeypatch.setitem(MASKS, "bright", Mask(priority, frozenset({"patches", "pixels"})))
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = torch.randn(2, 16, 5, requires_grad=True)
    config = MaskConfig("bright")
    keep = Selection(config, MaskInputs(4, 2, 1)).keep_indices(patches, images)
    assert keep is not None and keep.tolist() == [[8, 9, 10, 11, 12, 13, 14, 15]] * 2  # the lower half is brighter
    assert seen[0].noise is None and not seen[0].patches.requires_grad
    assert torch.equal(pixels_of(images, 4)[1, 6], images[1, :, 2:4, 4:6].permute(1, 2, 0).flatten())


def test_pool_is_the_mean_of_a_unit() -> None:
    values = torch.arange(16.0)[None]
    assert pool(values, 4, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_a_part_of_a_selection_is_of_the_same_samples() -> None:
    noise = torch.rand(2 * 3, 16)  # two views of three samples
    whole = Selection(MaskConfig("random"), MaskInputs(8, 2, 2, noise=noise, progress=torch.tensor(0.5)))
    part = whole.part(slice(1, 3)).inputs
    assert torch.equal(part.noise, noise[[1, 2, 4, 5]]) and part.progress == 0.5


def test_units_are_counted() -> None:
    assert num_units(14, 2) == 49 and masks.NONE not in MASKS


def test_views_of_one_tower_pass_choose_each_by_its_own_mask() -> None:
    """Views 0 and 2 at random, view 1 by scores, view 3 keeps all: as each alone, in the order of the views."""
    noise, scores, patches, images = torch.rand(2 * 3, 16), torch.rand(3, 16), torch.randn(12, 64, 5), torch.rand(12, 3)
    whole = MaskConfig("random", keep_ratio=1.0)
    at_random = Selection(whole, MaskInputs(8, 2, 2, noise=noise), views=(0, 2))
    by_scores = Selection(MaskConfig("attentive", keep_ratio=1.0), MaskInputs(8, 2, 1, scores=scores), views=(1,))
    all_stay = Selection(MaskConfig("none"), MaskInputs(8, 2, 1), views=(3,))
    kept = choose((at_random, by_scores, all_stay), 4, patches, images)
    assert kept is not None and torch.equal(kept, torch.arange(64).expand(12, -1))

    half = MaskConfig("random", keep_ratio=0.5)
    at_random = at_random._replace(config=half)
    by_scores = by_scores._replace(config=MaskConfig("attentive", keep_ratio=0.5), views=(1,))
    kept = choose((at_random, by_scores), 3, patches[:9], images[:9])
    alone = at_random.keep_indices(patches[:6], images[:6])
    assert kept is not None and alone is not None
    assert torch.equal(kept[:3], alone[:3]) and torch.equal(kept[6:], alone[3:])
    assert torch.equal(kept[3:6], by_scores.keep_indices(patches[:3], images[:3]))  # type: ignore[arg-type]


def test_a_mask_on_the_second_of_two_views_sees_that_view_s_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def priority(inputs: MaskInputs, options: object) -> Tensor:
        assert inputs.pixels is not None
        return pool(inputs.pixels.mean(-1), inputs.grid, inputs.unit)

    monkeypatch.setitem(MASKS, "bright", Mask(priority, frozenset({"pixels"})))
    images, patches = torch.rand(4, 3, 16, 16), torch.randn(4, 16, 5)
    noise = torch.rand(2, 4)
    first = Selection(MaskConfig("random"), MaskInputs(4, 2, 1, noise=noise), views=(0,))
    second = Selection(MaskConfig("bright"), MaskInputs(4, 2, 1), views=(1,))
    kept = choose((first, second), 2, patches, images)
    assert kept is not None and torch.equal(kept[2:], second.keep_indices(patches[2:], images[2:]))  # type: ignore[arg-type]
