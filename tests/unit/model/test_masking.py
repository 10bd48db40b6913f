import pytest
import torch

from amclip_ds.model import config, masking
from amclip_ds.model.config import MaskConfig, num_kept, num_kept_units
from amclip_ds.model.masking import TokenMask, select, tokens_of_units


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
    keep = select(MaskConfig(keep_ratio=0.5), grid=4, scores=scores)
    assert keep.tolist() == [[2, 3, 6, 7, 8, 9, 12, 13], [0, 1, 4, 5, 10, 11, 14, 15]]


def test_inverse_keeps_what_attentive_removes() -> None:
    scores = torch.rand(3, 49, generator=torch.Generator().manual_seed(0))
    best = select(MaskConfig(keep_ratio=24 / 49), grid=14, scores=scores)
    worst = select(MaskConfig(strategy="attentive_inverse", keep_ratio=25 / 49), grid=14, scores=scores)
    for row in range(3):
        assert sorted(best[row].tolist() + worst[row].tolist()) == list(range(196))


def test_random_keeps_the_smallest_draws_and_nothing_else_is_random() -> None:
    noise = torch.rand(2, 5, 196, generator=torch.Generator().manual_seed(1))
    config = MaskConfig(strategy="random", unit=1)
    keep = select(config, grid=14, noise=noise)
    assert keep.shape == (2, 5, 98)
    assert torch.equal(keep, noise.argsort(dim=-1)[..., :98].sort(dim=-1).values)
    torch.manual_seed(7)
    assert torch.equal(keep, select(config, grid=14, noise=noise))
    assert not torch.equal(keep, select(config, grid=14, noise=noise.flip(-1)))


def test_equal_scores_keep_the_first_units() -> None:
    keep = select(MaskConfig(keep_ratio=0.5), grid=8, scores=torch.zeros(1, 16))
    assert keep.tolist() == [list(range(32))]


def test_none_keeps_everything() -> None:
    assert select(MaskConfig(strategy="none"), grid=14) is None


@pytest.mark.parametrize("unit", [1, 2, 3, 6])
def test_units_tile_the_grid(unit: int) -> None:
    tokens = tokens_of_units(torch.arange((6 // unit) ** 2), 6, unit)
    assert sorted(tokens.tolist()) == list(range(36))


def test_token_mask_gathers() -> None:
    x = torch.arange(24.0).reshape(2, 4, 3)
    keep = torch.tensor([[0, 2], [1, 3]])
    assert torch.equal(TokenMask()(x, keep), torch.stack([x[0, [0, 2]], x[1, [1, 3]]]))
    assert TokenMask()(x, None) is x


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"keep_ratio": 0.0}, "mask.keep_ratio"), ({"keep_ratio": 1.5}, "mask.keep_ratio"), ({"unit": 0}, "mask.unit"),
     ({"strategy": "attentiv"}, "mask.strategy")],
)  # fmt: skip
def test_refuses(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        MaskConfig(**changes)


def test_refuses_a_unit_that_does_not_divide_the_grid() -> None:
    with pytest.raises(ValueError, match=r"mask\.unit: 3 does not divide"):
        num_kept(MaskConfig(unit=3), grid=14)
    with pytest.raises(ValueError, match="units given"):
        select(MaskConfig(), grid=14, scores=torch.zeros(1, 48))


def test_every_strategy_says_what_it_needs() -> None:
    assert tuple(masking.STRATEGIES) == config.MASK_STRATEGIES
    for name in masking.STRATEGIES:
        assert not (config.needs_scores(name) and config.needs_noise(name))
        assert (config.needs_scores(name) or config.needs_noise(name)) == (name != "none")
