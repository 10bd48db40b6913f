"""The masked patches' objective: which places it predicts, of what, and that pieces add up."""

import pytest
import torch
from torch import Tensor, nn

from amclip_ds import config
from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.method import Method, method_of
from amclip_ds.model.amclip import AClip, Sizes
from amclip_ds.model.config import PatchesOptions
from amclip_ds.model.features import Features, Seen
from amclip_ds.model.init import initialise
from amclip_ds.objectives import OBJECTIVES, builder, start_of
from amclip_ds.objectives.patches import Patches, positions, removed_places, whitened
from amclip_ds.optim import OptimConfig, parameter_groups
from tests.unit.engine.test_flat_gradients import Operators
from tests.unit.model import tiny

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


def test_positions_distinguish_places() -> None:
    table = positions(GRID, torch.empty(1, WIDTH))
    assert table.shape == (GRID**2, WIDTH) and len(table.unique(dim=0)) == GRID**2


def test_positions_are_computed_once() -> None:
    """On a GPU it is some twenty launches for each view of a step."""
    tokens = torch.empty(1, WIDTH, dtype=torch.bfloat16)
    first = positions(GRID, tokens, by_axis=True)
    with Operators() as seen:
        again = positions(GRID, tokens, by_axis=True)
    assert seen.count == 0 and torch.equal(again, first)
    assert not torch.equal(first, positions(GRID, tokens))
    assert positions(GRID, tokens.float(), by_axis=True).dtype == torch.float32


def late(*words: str) -> Method:
    return method_of(config.load("maskclip-tiny", ["loss.patches.start=0.8", "loss.mlm.weight=0", *words]))


def test_before_it_begins_nothing_that_it_alone_reads_is_made() -> None:
    before, after = late().at(0.79), late().at(0.8)
    assert list(before.objectives) == ["contrastive"] and not before.needs_teacher and len(before.masks) == 1
    assert after == late() and after.needs_teacher and len(after.groups(0.8)) == 2
    read = late("loss.views=[0,1]").at(0.1)
    assert len(read.masks) == 2 and not read.needs_teacher
    words = method_of(config.load("maskclip-tiny", ["loss.patches.start=0.8"])).at(0.1)  # mlm reads texts alone
    assert list(words.objectives) == ["contrastive", "mlm"] and len(words.masks) == 1


def test_what_the_loss_is_made_of_changes_where_it_begins_and_where_a_mask_keeps_another_number() -> None:
    assert [late().changes(*steps) for steps in ((0.0, 0.1), (0.79, 0.8), (0.8, 0.81), (0.7, 0.9))] == [0, 1, 0, 1]
    scheduled = late("mask.strategy=random", "mask.unit=1", "mask.schedule=linear", "mask.final_keep_ratio=0.5")
    assert [scheduled.changes(n / 16, (n + 1) / 16) for n in range(12)] == [n % 2 == 1 for n in range(12)]
    detail = method_of(config.load("detailclip-tiny", ["loss.detailclip.start=0.5"]))
    found = [n for n in range(100) if detail.changes(n / 100, (n + 1) / 100)]
    assert found == [49, 53]  # the patches' temperature is another after 0.04 of the run


def test_before_it_begins_the_model_gives_no_term_of_it() -> None:
    model, options = tiny.model_config(), PatchesOptions(0.5, start=0.8)
    objectives = {"contrastive": OBJECTIVES["contrastive"].Options(1.0, [0]), "patches": options}
    student = AClip(model, builder(objectives))
    initialise(student, start_of(0, model, objectives))
    images, texts = torch.randn(2 * B, 3, 32, 32), torch.full((B, 8), tiny.EOS)
    whole = tiny.inputs(images, texts, torch.arange(4).expand(2 * B, 4))
    targets = {"patches": (torch.randn(B, GRID**2, 32),)}
    found = {
        progress: student.encode_and_losses(
            whole._replace(progress=progress), targets if progress >= 0.8 else {}, SingleProcess()
        )[0]
        for progress in (0.0, 0.79, 0.8)
    }
    assert set(found[0.0].terms) == set(found[0.79].terms) == {"contrastive"} and "patches" in found[0.8].terms
    groups = parameter_groups(student.named_parameters(), OptimConfig(), {"contrastive": 0.0, "patches": 0.8})
    starts = {name: group["start"] for group in groups for name in group["names"]}
    assert {name for name, share in starts.items() if share} == {name for name in starts if "patches." in name}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.patches.start=1"], "loss.patches.start: 1.0 is outside [0, 1), a share of the run"),
        (
            ["loss.patches.start=0.5", "loss.contrastive_weight=0", "loss.mlm.weight=0"],
            "loss.patches.start: nothing else has a weight",
        ),
        (["loss.patches.from=0.5"], "loss.patches.from: unknown key; did you mean loss.patches.start?"),
    ],
)
def test_a_wrong_start_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("maskclip-tiny", words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_all_norms_of_the_decoder_have_the_published_epsilon() -> None:
    norms = [module for module in objective().decoder.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 3 and {norm.eps for norm in norms} == {1e-6}


def test_a_view_that_keeps_everything_is_one_line() -> None:
    features, seen = given()
    with pytest.raises(UserError, match="keeps every token; give it a mask"):
        objective().per_sample(features._replace(keep_indices=(None,)), (seen,))
