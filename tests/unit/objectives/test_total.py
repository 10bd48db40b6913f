"""The loss is the weighted sum of the objectives' terms, each built where it has a weight."""

import pytest
import torch

from amclip_ds.comm import SingleProcess
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import HeadsConfig, LossConfig
from amclip_ds.model.features import Features, Losses
from amclip_ds.model.init import initialise
from amclip_ds.objectives import Objective, builder, chosen, start_of
from amclip_ds.objectives.contrastive import info_nce
from amclip_ds.objectives.sigmoid import sigmoid
from amclip_ds.objectives.simclr import online_to_online
from tests.unit.model import tiny

CLS, EOT = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((2, 6, 32), (6, 32)))


def losses(pairs_views: bool = True, views: int = 2, **loss: object) -> tuple[AClip, Losses]:
    model, heads = tiny.model_config(), HeadsConfig(hidden_dim=24, output_dim=12)
    objectives = chosen(LossConfig(**loss), heads, pairs_views)  # type: ignore[arg-type]
    student = AClip(model, builder(objectives))
    initialise(student, start_of(0, model, objectives))
    return student, student.losses(CLS[:views], {"plain": EOT}, tiny.targets(6), {}, None, SingleProcess())


def test_is_the_weighted_sum_and_reports_the_terms() -> None:
    _, found = losses()
    assert list(found.terms) == ["contrastive", "o2o", "o2e"]
    contrastive, o2o, o2e = found.terms.values()
    assert found.total.item() == (contrastive + o2o + 2 * o2e).item()  # 1/2 C1 + 1/2 C2 + O2O + 2 O2E
    _, weighted = losses(contrastive_weight=3, o2o_weight=0.5, o2e_weight=0.25)
    torch.testing.assert_close(weighted.total, 3 * contrastive + 0.5 * o2o + 0.25 * o2e)


def test_only_what_has_a_weight_is_built() -> None:
    student, found = losses(views=1, o2o_weight=0, o2e_weight=0)
    assert list(student.objectives) == ["contrastive"] and found.total.item() == found.terms["contrastive"].item()
    student, found = losses(contrastive_weight=0, o2e_weight=0)
    assert list(student.objectives) == ["simclr"] and list(found.terms) == ["o2o"]


def test_sigmoid_is_chosen_by_the_kind() -> None:
    student, found = losses(kind="sigmoid", o2o_weight=0, o2e_weight=0)
    images = torch.nn.functional.normalize(student.image_projection(CLS), dim=-1)
    texts = torch.nn.functional.normalize(student.text_projection(EOT), dim=-1)
    assert student.logit_bias is not None
    scale = student.logit_scale.exp()
    expected = sigmoid(images, texts, scale, student.logit_bias, SingleProcess())
    torch.testing.assert_close(found.total, expected)
    with pytest.raises(AssertionError):  # the twin
        torch.testing.assert_close(found.total, info_nce(images, texts, scale, SingleProcess()))


def test_the_pairing_reaches_the_online_to_online_term() -> None:
    for pairs_views in (True, False):
        student, found = losses(pairs_views=pairs_views)
        simclr = student.objectives["simclr"]
        head = simclr.head(CLS.flatten(0, 1), SingleProcess().all_reduce_sum).unflatten(0, CLS.shape[:2])
        right, wrong = (
            online_to_online(head, simclr.options.temperature, SingleProcess(), pairing)
            for pairing in (pairs_views, not pairs_views)
        )
        torch.testing.assert_close(found.terms["o2o"], right)
        assert not torch.isclose(found.terms["o2o"], wrong)


def test_an_objective_sees_only_its_views_and_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Features] = []

    class Second(Objective):
        features = frozenset({"cls"})
        views = (1,)

        def forward(self, features, targets, comm):  # type: ignore[no-untyped-def]
            seen.append(features)
            return {"second": features.cls.square().mean()}

    monkeypatch.setitem(__import__("amclip_ds.objectives").objectives.OBJECTIVES, "second", Second)
    student = AClip(tiny.model_config(), builder({"second": Second.Options(weight=2.0)}))
    found = student.losses(CLS, {"plain": EOT}, {}, {}, None, SingleProcess())
    assert torch.equal(seen[0].cls, CLS[1:]) and seen[0].image_embeds is None
    torch.testing.assert_close(found.total, 2 * CLS[1].square().mean())


@pytest.mark.parametrize(
    "changes", [{"kind": "nce"}, {"o2o_weight": -1.0}, {"chunk": -1}, {"o2o_temperature": 0.0}], ids=str
)
def test_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{next(iter(changes))}"):
        LossConfig(**changes)  # type: ignore[arg-type]
