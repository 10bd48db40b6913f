"""CLIP-KD's objective as a part of the model: its terms, weights, scale, and what it says of another width."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds import config
from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.method import method_of
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import ClipKDOptions
from amclip_ds.model.features import Features
from amclip_ds.objectives.clipkd import ClipKD, relation
from tests.unit.thread_ranks import ThreadComm, run_threads

SIZES = Sizes(16, 12, 8, 8, 8, 16, 100)
B, E = 6, 8


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def terms(images: Tensor, options: ClipKDOptions | None = None, width: int = E) -> dict[str, Tensor]:
    objective = ClipKD(options or ClipKDOptions(1.0), SIZES)
    features = Features(image_embeds=images, text_embeds=unit(B, E, seed=1), logit_scale=torch.tensor([14.0]))
    taught = unit(B, len(images), width, seed=2), unit(B, width, seed=3), torch.full((B, 1), 50.0)
    return objective(features, taught, SingleProcess())


def test_views_are_averaged_and_each_has_its_own_teacher() -> None:
    both = unit(2, B, E)
    found = terms(both)
    assert set(found) == {"kd_feature", "kd_interactive", "kd_relation"}
    assert not torch.allclose(found["kd_feature"], terms(both.flip(0))["kd_feature"])


def test_a_perfect_student_has_nothing_to_learn_of_features_and_relations() -> None:
    images, texts, scale = unit(B, E), unit(B, E, seed=1), torch.tensor([14.0])
    assert relation((images, texts), (images, texts), scale, scale, SingleProcess()).abs() < 1e-6
    assert relation((images, texts), (texts, images), scale, scale, SingleProcess()) > 0.1


def test_weights_multiply() -> None:
    objective = ClipKD(ClipKDOptions(0.5, feature_weight=10.0, relation_weight=0.0), SIZES)
    weights = [objective.weight_of(name) for name in ("kd_feature", "kd_interactive", "kd_relation")]
    assert weights == [5.0, 0.5, 0.0]


def test_the_released_scale_is_the_logarithm() -> None:
    """The rule of its first value is ln(1 / 0.07); here it is 0, whose exp is 1."""
    (rule,) = ClipKD.init.values()
    assert float(rule(None, (1,), None)) == pytest.approx(math.log(1 / 0.07))  # type: ignore[arg-type]
    raw = terms(unit(1, B, E), ClipKDOptions(1.0, raw_scale=True))["kd_interactive"]
    assert float(raw.detach()) == pytest.approx(math.log(B))
    assert not torch.allclose(raw, terms(unit(1, B, E))["kd_interactive"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_samples_count(world_size: int) -> None:
    own, taught = (unit(B, E), unit(B, E, seed=1)), (unit(B, E, seed=2), unit(B, E, seed=3))
    scale, theirs = torch.tensor([14.0]), torch.tensor([50.0])

    def work(comm: ThreadComm) -> Tensor:
        parts = [tuple(rows.chunk(world_size)[comm.rank] for rows in pair) for pair in (own, taught)]
        return relation(parts[0], parts[1], scale, theirs, comm)  # type: ignore[arg-type]

    whole = relation(own, taught, scale, theirs, SingleProcess())
    torch.testing.assert_close(torch.stack(run_threads(world_size, work)).mean(), whole)


def test_a_teacher_of_another_width_is_one_line() -> None:
    with pytest.raises(
        UserError, match="distill.teacher: its embeddings are 12 wide, the student's 8; set loss.clipkd.project_to=12"
    ):
        terms(unit(1, B, E), width=12)


def test_without_a_weight_it_is_not_built() -> None:
    assert "clipkd" not in method_of(config.load("clip-tiny")).objectives
    assert "clipkd" in method_of(config.load("clipkd-tiny", ["distill.teacher=run"])).objectives


def test_a_wider_teacher_meets_maps_of_the_students_embeddings() -> None:
    made = ClipKD(ClipKDOptions(1.0, project_to=12), SIZES)
    images, texts = torch.randn(1, B, E), torch.randn(B, E)
    features = Features(
        image_embeds=F.normalize(images, dim=-1),
        text_embeds=F.normalize(texts, dim=-1),
        image_projected=images,
        text_projected=texts,
        logit_scale=torch.tensor([14.0]),
    )
    taught = unit(B, 1, 12, seed=2), unit(B, 12, seed=3), torch.full((B, 1), 50.0)
    found = made(features, taught, SingleProcess())
    near = F.normalize(made.image_map(images[0]), dim=-1), F.normalize(made.text_map(texts), dim=-1)
    wanted = (near[0] - taught[0][:, 0]).square().mean() + (near[1] - taught[1]).square().mean()
    torch.testing.assert_close(found["kd_feature"], wanted)
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(weight.grad is not None and weight.grad.any() for name, weight in made.named_parameters())
    assert not [name for name, _ in ClipKD(ClipKDOptions(1.0), SIZES).named_parameters() if "map" in name]
