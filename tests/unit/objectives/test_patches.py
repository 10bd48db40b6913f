"""The masked patches' objective: which places it predicts, of what, and that pieces add up."""

import pytest
import torch
from torch import Tensor, nn

from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import PatchesOptions
from amclip_ds.model.features import Features, Seen
from amclip_ds.objectives.patches import Patches, positions, removed_places, whitened

GRID, WIDTH, B, K = 4, 32, 6, 5
SIZES = Sizes(WIDTH, 12, 8, GRID, 8, 16, 100)


def objective() -> Patches:
    torch.manual_seed(0)
    made = Patches(PatchesOptions(0.05), SIZES)
    with torch.no_grad():
        made.decoder.mask_token.normal_()
    return made


def given(seed: int = 0) -> tuple[Features, Tensor]:
    g = torch.Generator().manual_seed(seed)
    keep = torch.stack([torch.randperm(GRID**2, generator=g)[:K].sort().values for _ in range(B)])
    features = Features(
        cls=torch.randn(1, B, WIDTH, generator=g),
        patches=(torch.randn(B, K, WIDTH, generator=g),),
        keep_indices=(keep,),
    )
    return features, torch.randn(B, GRID**2, WIDTH, generator=g)


def part(features: Features, rows: slice) -> Features:
    assert features.cls is not None and features.patches is not None and features.keep_indices is not None
    keep = features.keep_indices[0]
    assert keep is not None
    return Features(cls=features.cls[:, rows], patches=(features.patches[0][rows],), keep_indices=(keep[rows],))


def test_removed_places_are_all_others() -> None:
    keep = torch.tensor([[0, 3, 5], [1, 2, 4]])
    assert removed_places(keep, 6).tolist() == [[1, 2, 4], [0, 3, 5]]


def test_only_what_the_teacher_sees_at_removed_places_counts() -> None:
    made, (features, seen) = objective(), given()
    loss = made.per_sample(features, (seen,))["patches"]
    assert features.keep_indices is not None and features.keep_indices[0] is not None
    elsewhere = seen.scatter(1, features.keep_indices[0][..., None].expand(-1, -1, WIDTH), 9.0)
    assert torch.equal(loss, made.per_sample(features, (elsewhere,))["patches"])
    assert not torch.equal(loss, made.per_sample(features, (seen + 1,))["patches"])


def test_a_pieces_mean_is_the_wholes() -> None:
    made, (features, seen) = objective(), given()
    whole = made.per_sample(features, (seen,))["patches"]
    pieces = [made.per_sample(part(features, rows), (seen[rows],))["patches"] for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close((2 * pieces[0] + 4 * pieces[1]) / 6, whole)


def test_every_weight_gets_a_gradient() -> None:
    made, (features, seen) = objective(), given()
    made.per_sample(features, (seen,))["patches"].backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())


def test_the_target_is_the_teachers_tokens_whitened() -> None:
    tokens = torch.randn(2, 9, WIDTH) * 7 + 3
    (target,) = objective().observe(nn.ModuleDict(), Seen(None, tokens), SingleProcess())
    assert torch.equal(target, whitened(tokens))
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1, unbiased=False), torch.ones(2, 9), atol=1e-3, rtol=0)


def test_positions_tell_places_apart() -> None:
    table = positions(GRID, torch.empty(1, WIDTH))
    assert table.shape == (GRID**2, WIDTH) and len(table.unique(dim=0)) == GRID**2


def test_a_view_that_keeps_everything_is_one_line() -> None:
    features, seen = given()
    with pytest.raises(UserError, match="keeps every token; give it a mask"):
        objective().per_sample(features._replace(keep_indices=(None,)), (seen,))
