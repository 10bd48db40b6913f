"""The training loss: contrastive, online-to-online and online-to-EMA terms, weighted and summed."""

from torch import Tensor

from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import Comm
from amclip_ds.loss.contrastive import info_nce, sigmoid
from amclip_ds.loss.outputs import Outputs
from amclip_ds.loss.self_supervised import online_to_ema, online_to_online


def total_loss(
    outputs: Outputs, teacher_target: Tensor | None, config: LossConfig, comm: Comm, compat: str = "paper"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to differentiate, and its unweighted terms for the record (detached, of this rank).

    outputs: of AClip. teacher_target: [B, P] of the teacher, for the online-to-EMA term.
    Collective: every rank must call.
    """
    zero = outputs.text_embeds.new_zeros(())
    if config.kind == "sigmoid":
        assert outputs.logit_bias is not None
        contrastive = sigmoid(
            outputs.image_embeds, outputs.text_embeds, outputs.logit_scale, outputs.logit_bias, comm, config.chunk
        )
    else:
        contrastive = info_nce(outputs.image_embeds, outputs.text_embeds, outputs.logit_scale, comm, config.chunk)
    o2o = zero
    if outputs.o2o is not None:
        o2o = online_to_online(outputs.o2o, config.o2o_temperature, comm, compat, config.chunk)
    o2e = zero
    if outputs.o2e is not None:
        assert teacher_target is not None, "the online-to-EMA loss needs the teacher's target"
        o2e = online_to_ema(outputs.o2e, teacher_target)
    loss = config.contrastive_weight * contrastive + config.o2o_weight * o2o + config.o2e_weight * o2e
    return loss, {"loss_contrastive": contrastive.detach(), "loss_o2o": o2o.detach(), "loss_o2e": o2e.detach()}
