"""The student: both towers, the projections, the heads and the logit scale, behind one forward.

Shapes: V views, B samples, D vision width, W text width, E embedding, P output of the heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import Comm, SingleProcess
from amclip_ds.loss.outputs import Outputs
from amclip_ds.model.config import HeadsConfig, ModelConfig
from amclip_ds.model.heads import build_o2e_predictor, build_o2e_projector, build_o2o
from amclip_ds.model.text import TextTower
from amclip_ds.model.vision import VisionTower


class TowerFeatures(NamedTuple):
    """A tuple, as Outputs is, for ZeRO-3's hooks."""

    cls: Tensor
    """[V * B, D], view-major."""
    eot: Tensor
    """[B, W]"""


class AClip(nn.Module):
    """One module with one forward, so that one engine has one gradient norm, one skip decision and one step.

    Heads exist only where their loss has a weight.
    """

    def __init__(self, model: ModelConfig, heads: HeadsConfig, loss: LossConfig) -> None:
        super().__init__()
        self.vision = VisionTower(model.vision)
        self.text = TextTower(model.text)
        self.image_projection = nn.Linear(self.vision.width, model.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, model.embed_dim, bias=False)
        self.heads = nn.ModuleDict()
        if loss.o2o_weight > 0:
            self.heads["o2o"] = build_o2o(self.vision.width, heads)
        if loss.o2e_weight > 0:
            self.heads["o2e_projector"] = build_o2e_projector(self.vision.width, heads)
            self.heads["o2e_predictor"] = build_o2e_predictor(heads)
        self.logit_scale = nn.Parameter(torch.zeros(1))  # (1,): a 0-d parameter crashes deepspeed.initialize
        self.logit_bias = nn.Parameter(torch.zeros(1)) if loss.kind == "sigmoid" else None

    def forward(
        self,
        phase: str,
        *,
        images: Tensor | None = None,
        keep_indices: Tensor | None = None,
        token_ids: Tensor | None = None,
        cls: Tensor | None = None,
        eot: Tensor | None = None,
        comm: Comm | None = None,
    ) -> TowerFeatures | Outputs | Tensor:
        """phase: what to compute.

        towers: images [V * B, 3, H, W] view-major, keep_indices [V * B, K] or None, token_ids [B, T] -> TowerFeatures
        heads:  cls [V * B, D], eot [B, W] -> Outputs. Collective (batch norm): every rank must call
        all:    towers, then heads. Collective: every rank must call
        image:  images [B, 3, H, W] -> normalised embeddings [B, E] fp32
        text:   token_ids [B, T] -> normalised embeddings [B, E] fp32
        """
        if phase == "towers":
            return TowerFeatures(self.vision(images, keep_indices), self.text(token_ids))
        if phase == "heads":
            assert cls is not None and eot is not None
            return self._heads(cls, eot, comm or SingleProcess())
        if phase == "all":
            return self._heads(self.vision(images, keep_indices), self.text(token_ids), comm or SingleProcess())
        if phase == "image":
            return normalise(self.image_projection(self.vision(images)))
        if phase == "text":
            return normalise(self.text_projection(self.text(token_ids)))
        raise ValueError(f"phase: {phase!r} is none of towers, heads, all, image, text")

    def _heads(self, cls: Tensor, eot: Tensor, comm: Comm) -> Outputs:
        B = eot.shape[0]
        o2o = o2e = None
        if "o2o" in self.heads:
            o2o = self.heads["o2o"](cls, comm.all_reduce_sum).unflatten(0, (-1, B))
        if "o2e_projector" in self.heads:
            projected = self.heads["o2e_projector"](cls, comm.all_reduce_sum)
            o2e = self.heads["o2e_predictor"](projected, comm.all_reduce_sum).unflatten(0, (-1, B))
        return Outputs(
            image_embeds=normalise(self.image_projection(cls)).unflatten(0, (-1, B)),
            text_embeds=normalise(self.text_projection(eot)),
            o2o=o2o,
            o2e=o2e,
            logit_scale=self.logit_scale.float().exp(),
            logit_bias=None if self.logit_bias is None else self.logit_bias.float(),
        )


def normalise(x: Tensor) -> Tensor:
    """Rows of unit length, in fp32."""
    return F.normalize(x.float(), dim=-1)
