import pytest
import torch

from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import SingleProcess
from amclip_ds.loss.contrastive import info_nce, sigmoid
from amclip_ds.loss.outputs import Outputs
from amclip_ds.loss.self_supervised import online_to_ema, online_to_online
from amclip_ds.loss.total import total_loss
from amclip_ds.model.amclip import normalise


def outputs(views: int = 2, heads: bool = True) -> tuple[Outputs, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = Outputs(
        image_embeds=normalise(torch.randn(views, 6, 8, generator=draw)),
        text_embeds=normalise(torch.randn(6, 8, generator=draw)),
        o2o=torch.randn(views, 6, 5, generator=draw) if heads else None,
        o2e=torch.randn(views, 6, 5, generator=draw) if heads else None,
        logit_scale=torch.tensor([10.0]),
        logit_bias=torch.tensor([-5.0]),
    )
    return made, torch.randn(6, 5, generator=draw)


def test_is_the_weighted_sum_and_reports_the_terms() -> None:
    made, target = outputs()
    comm = SingleProcess()
    contrastive = info_nce(made.image_embeds, made.text_embeds, made.logit_scale, comm)
    o2o, o2e = online_to_online(made.o2o, 0.1, comm), online_to_ema(made.o2e, target)
    loss, terms = total_loss(made, target, LossConfig(), comm)
    torch.testing.assert_close(loss, contrastive + o2o + 2 * o2e)  # 1/2 C1 + 1/2 C2 + O2O + 2 O2E
    torch.testing.assert_close(terms, {"loss_contrastive": contrastive, "loss_o2o": o2o, "loss_o2e": o2e})
    weighted, _ = total_loss(made, target, LossConfig(contrastive_weight=3, o2o_weight=0.5, o2e_weight=0.25), comm)
    torch.testing.assert_close(weighted, 3 * contrastive + 0.5 * o2o + 0.25 * o2e)


def test_without_heads_only_the_contrastive_term_remains() -> None:
    made, _ = outputs(views=1, heads=False)
    loss, terms = total_loss(made, None, LossConfig(o2o_weight=0, o2e_weight=0), SingleProcess())
    assert loss.item() == terms["loss_contrastive"].item() and terms["loss_o2o"] == terms["loss_o2e"] == 0


def test_sigmoid_is_chosen_by_the_kind() -> None:
    made, _ = outputs(heads=False)
    loss, _ = total_loss(made, None, LossConfig(kind="sigmoid"), SingleProcess())
    expected = sigmoid(made.image_embeds, made.text_embeds, made.logit_scale, made.logit_bias, SingleProcess())
    torch.testing.assert_close(loss, expected)


def test_compat_reaches_the_online_to_online_term() -> None:
    made, target = outputs()
    paper = total_loss(made, target, LossConfig(), SingleProcess())[1]["loss_o2o"]
    release = total_loss(made, target, LossConfig(), SingleProcess(), compat="release")[1]["loss_o2o"]
    assert release < paper


@pytest.mark.parametrize(
    "changes", [{"kind": "nce"}, {"o2o_weight": -1.0}, {"chunk": -1}, {"o2o_temperature": 0.0}], ids=str
)
def test_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{next(iter(changes))}"):
        LossConfig(**changes)
