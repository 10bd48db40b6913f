"""The self-supervised losses: online-to-online (SimCLR's NT-Xent) and online-to-EMA (BYOL's cosine).

Shapes: V views, B samples of this rank, W ranks, P output of the heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.loss.comm import Comm
from amclip_ds.loss.contrastive import cross_entropy


def online_to_online(
    features_VBP: Tensor, temperature: float, comm: Comm, compat: str = "paper", chunk: int = 0
) -> Tensor:
    """NT-Xent between two views: 2 W B - 1 candidates a row, both directions averaged.

    compat `release` pairs view 1 with itself, as the published code does: view 2 then gets no gradient.
    Collective: every rank must call.
    """
    if features_VBP.shape[0] != 2:
        raise ValueError(f"loss.o2o_weight: this loss needs 2 views, not {features_VBP.shape[0]}")
    B = features_VBP.shape[1]
    features = F.normalize(features_VBP.float(), dim=-1)
    gathered = comm.all_gather(features.transpose(0, 1).contiguous()).transpose(0, 1)  # [2, W * B, P]
    partner = 1 if compat == "paper" else 0
    labels = comm.rank * B + torch.arange(B, device=features.device)
    total = features.new_zeros(())
    for own, other in ((0, partner), (partner, 0)):
        candidates = torch.cat([gathered[other], gathered[own]])
        itself = gathered.shape[1] + labels
        total = total + cross_entropy(features[own], candidates, labels, 1 / temperature, itself, chunk)
    return total / 2


def online_to_ema(predictions_VBP: Tensor, target_BP: Tensor) -> Tensor:
    """Mean over the V * B rows of 2 - 2 cos(prediction, target); the target is each view's, and gets no gradient."""
    predictions = F.normalize(predictions_VBP.float(), dim=-1)
    target = F.normalize(target_BP.detach().float(), dim=-1)
    return (2 - 2 * (predictions * target).sum(-1)).mean()
