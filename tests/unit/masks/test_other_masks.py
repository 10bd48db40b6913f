"""centered, cluster, pgs, salience, attentive_noise, disjoint: what the oracle (tests/parity) does not say of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from amclip_ds.masks import MASKS, MaskConfig, MaskInputs, centered, cluster, options_of, pgs, salience
from amclip_ds.masks.selection import select
from benchmarks.tensor_memory import TensorMemory

GRID, PATCH, WIDTH = 8, 4, 12


def inputs_of(strategy: str, rows: int = 6, unit: int = 1, views: int = 1, seed: int = 0) -> MaskInputs:
    """What a mask reads, and nothing else."""
    g = torch.Generator().manual_seed(seed)
    U, N = (GRID // unit) ** 2, GRID**2
    all_of_it: dict[str, Tensor] = {
        "noise": torch.rand(rows, U, generator=g),
        "noise2": torch.rand(rows, U, generator=g),
        "scores": torch.rand(rows, U, generator=g),
        "patches": torch.randn(rows, N, WIDTH, generator=g),
        "pixels": torch.randn(rows, N, PATCH * PATCH * 3, generator=g),
    }
    given: dict[str, Any] = {name: all_of_it[name] for name in MASKS[strategy].needs}
    return MaskInputs(GRID, unit, views, progress=torch.tensor(0.25), **given)


@pytest.mark.parametrize("strategy", list(MASKS))
@pytest.mark.parametrize("unit", [1, 2])
def test_every_mask_keeps_k_tokens_in_whole_units_of_what_it_asks_for(strategy: str, unit: int) -> None:
    keep = select(MaskConfig(strategy, 0.25, unit), inputs_of(strategy, unit=unit))
    assert keep is not None and keep.shape == (6, 16) and (keep.diff(dim=1) > 0).all()
    side = GRID // unit
    units = keep // GRID // unit * side + keep % GRID // unit
    assert all(len(row.unique()) == 16 // unit**2 for row in units)


@pytest.mark.parametrize("strategy", [name for name in MASKS if name != "disjoint"])
def test_a_rows_choice_depends_on_no_other_row(strategy: str) -> None:
    """So that every split and world chooses alike."""
    whole = inputs_of(strategy)
    rows = {n: v[2:4] for n, v in whole._asdict().items() if isinstance(v, Tensor) and v.dim()}
    config = MaskConfig(strategy, 0.25, 1)
    both, alone = select(config, whole), select(config, whole._replace(**rows))
    assert both is not None and alone is not None and torch.equal(both[2:4], alone)


def test_the_middle_stays_more_often_with_less_variance() -> None:
    def middle(sigma2: float) -> float:
        config = MaskConfig("centered", 0.25, 1)
        config.centered = centered.Options(sigma2)  # type: ignore[attr-defined]
        noise = torch.rand(400, GRID**2, generator=torch.Generator().manual_seed(0))
        keep = select(config, MaskInputs(GRID, 1, 1, noise=noise))
        assert keep is not None
        row, column = keep // GRID, keep % GRID
        return float(((row > 1) & (row < 6) & (column > 1) & (column < 6)).float().mean())

    assert middle(0.05) > middle(0.2) > middle(5.0) + 0.1
    assert middle(1e6) == pytest.approx(0.25, abs=0.02)


def test_a_cluster_goes_whole_and_its_anchor_too() -> None:
    """Half of the patches are one texture: anchored there, none of them stays."""
    g = torch.Generator().manual_seed(3)
    pixels = torch.randn(1, GRID**2, 48, generator=g)
    pixels[:, :32] = torch.randn(48, generator=g)
    noise = torch.zeros(1, GRID**2)
    noise[0, 5] = 0.9  # the one anchor
    for rule in ("topk", "fill"):
        config = MaskConfig("cluster", 0.5, 1)
        config.cluster = cluster.Options(0.001, rule)  # type: ignore[attr-defined]
        inputs = MaskInputs(GRID, 1, 1, noise=noise, noise2=torch.rand(1, 64, generator=g), pixels=pixels)
        keep = select(config, inputs)
        assert keep is not None and keep.tolist() == [list(range(32, 64))]


def test_a_patch_without_contrast_is_like_nothing() -> None:
    vectors = cluster.unit_length(torch.stack([torch.full((48,), 3.0), torch.arange(48.0)])[None])
    assert not vectors[0, 0].any() and float(vectors[0, 1].norm()) == pytest.approx(1)


def test_cluster_forms_no_map_of_all_pairs() -> None:
    """Its memory grows with the patches, not with their square."""

    def extra(U: int) -> int:
        vectors = cluster.unit_length(torch.randn(2, U, 12, generator=torch.Generator().manual_seed(0)))
        chosen = torch.arange(6).expand(2, 6)
        with TensorMemory() as memory:
            cluster.similarity_with(vectors, chosen)
        return memory.peak_bytes

    small, large = extra(400), extra(1600)
    assert large < 6 * small and large < 2 * 1600 * 1600 * 4  # 16 times, were it of all pairs


@pytest.mark.parametrize("flag", [True, False])
def test_tf32_changes_no_similarity(flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product that TF32 could round is formed: cluster and pgs multiply and sum."""
    called: list[str] = []
    for name in ("matmul", "bmm", "mm", "einsum", "baddbmm"):
        monkeypatch.setattr(torch, name, lambda *args, name=name, **named: called.append(name))
    monkeypatch.setattr(Tensor, "__matmul__", lambda *args: called.append("@"))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", flag)
    for strategy in ("cluster", "pgs"):
        select(MaskConfig(strategy, 0.25, 1), inputs_of(strategy))
    assert not called


def test_pgs_begins_with_the_pixels_and_ends_with_the_embeddings() -> None:
    """At the start as without embeddings, at the end as without pixels."""
    given = inputs_of("pgs")
    config = MaskConfig("pgs", 0.25, 1)
    config.pgs = pgs.Options(edges="none")  # type: ignore[attr-defined]
    other_pixels = given._replace(pixels=torch.randn_like(given.pixels))  # type: ignore[arg-type]
    other_patches = given._replace(patches=torch.randn_like(given.patches))  # type: ignore[arg-type]

    def keep(inputs: MaskInputs, progress: float) -> Tensor:
        found = select(config, inputs._replace(progress=torch.tensor(progress)))
        assert found is not None
        return found

    assert torch.equal(keep(given, 0.0), keep(other_patches, 0.0))
    assert not torch.equal(keep(given, 0.0), keep(other_pixels, 0.0))
    assert torch.equal(keep(given, 1.0), keep(other_pixels, 1.0))
    assert not torch.equal(keep(given, 1.0), keep(other_patches, 1.0))


@pytest.mark.parametrize("kind", ["pixels", "means"])
def test_anchors_keep_away_from_edges(kind: str) -> None:
    """A bright square in an even image: its outline has the edges, and `high` turns them round."""
    pixels = torch.zeros(1, GRID, GRID, PATCH * PATCH * 3)
    pixels[:, 2:4, 2:4] = 1.0
    found = pgs.edges(pixels.flatten(1, 2), GRID, kind).reshape(GRID, GRID)
    assert found.max() == pytest.approx(1, abs=1e-5) and found.min() == 0
    assert found[1:5, 1:5].mean() > 0.2 > found[5:7, 5:7].mean()


def test_salience_keeps_the_plain_as_published_or_the_salient() -> None:
    tokens = torch.zeros(1, 16, 4)
    tokens[0, :4] = 3.0  # the salient: everything attends to them
    noise = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    for keeps, stays in (("plain", False), ("salient", True)):
        config = MaskConfig("salience", 0.25, 1)
        config.salience = salience.Options(keeps=keeps)  # type: ignore[attr-defined]
        keep = select(config, MaskInputs(4, 1, 1, noise=noise, patches=tokens))
        assert keep is not None and (keep.tolist() == [[0, 1, 2, 3]]) is stays


def test_attentive_noise_follows_the_scores_but_not_always() -> None:
    g = torch.Generator().manual_seed(0)
    noise, scores = torch.rand(500, 16, generator=g), torch.linspace(0, 1, 16).expand(500, 16)
    keep = select(MaskConfig("attentive_noise", 0.25, 1), MaskInputs(4, 1, 1, noise=noise, scores=scores))
    assert keep is not None
    best = (keep >= 12).float().mean()
    assert 0.5 < best < 0.95 and not (keep < 4).any()  # a draw of weight 0.5 against a range of 1


def test_disjoint_views_share_no_unit_and_split_one_order() -> None:
    given = inputs_of("disjoint", rows=12, views=3)
    keep = select(MaskConfig("disjoint", 0.25, 2), given._replace(unit=2, noise=torch.rand(12, 16)))
    assert keep is not None
    views = keep.unflatten(0, (3, 4))
    for sample in range(4):
        tokens = [set(views[view, sample].tolist()) for view in range(3)]
        assert len(set().union(*tokens)) == 3 * 16 and all(len(one) == 16 for one in tokens)


def test_without_their_keys_masks_have_their_defaults() -> None:
    assert options_of(MaskConfig("centered")) == centered.Options(0.2)
    assert options_of(MaskConfig("random")) is None
    config = MaskConfig("centered")
    config.centered = centered.Options(0.5)  # type: ignore[attr-defined]
    assert options_of(config).sigma2 == 0.5


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("centered", "sigma2", 0.0),
        ("centered", "sigma2", math.nan),
        ("cluster", "anchor_ratio", 1.0),
        ("cluster", "rule", "max"),
        ("cluster", "threshold", 2.0),
        ("pgs", "anchor_ratio", 0.0),
        ("pgs", "embeddings", 1.5),
        ("pgs", "edges", "sobel"),
        ("pgs", "anchors_at", "left"),
        ("pgs", "balance", "ot"),
        ("salience", "keeps", "all"),
        ("attentive_noise", "noise", -1.0),
    ],
)
def test_a_wrong_option_names_its_key(kind: str, option: str, value: object) -> None:
    options = MASKS[kind].options
    assert options is not None
    with pytest.raises(ValueError, match=rf"mask\.{kind}\.{option}: "):
        options(**{option: value})
