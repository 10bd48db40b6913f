"""The teacher as a module: the parts of the student that it averages, under the same names.

Shapes: B samples, N patches, P output of the heads, E embedding.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from amclip_ds.loss import LossConfig
from amclip_ds.loss.comm import Comm, SingleProcess
from amclip_ds.model.amclip import normalise
from amclip_ds.model.config import HeadsConfig, ModelConfig
from amclip_ds.model.heads import build_o2e_projector
from amclip_ds.model.text import TextTower
from amclip_ds.model.vision import VisionTower


class TeacherModel(nn.Module):
    """Never trained by gradient: every parameter has requires_grad False."""

    def __init__(self, model: ModelConfig, heads: HeadsConfig, loss: LossConfig) -> None:
        super().__init__()
        self.vision = VisionTower(model.vision)
        self.text = TextTower(model.text)
        self.image_projection = nn.Linear(self.vision.width, model.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, model.embed_dim, bias=False)
        self.heads = nn.ModuleDict()
        if loss.o2e_weight > 0:
            self.heads["o2e_projector"] = build_o2e_projector(self.vision.width, heads)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "TeacherModel":
        """The projector's batch norm always normalises by the batch: its statistics are its own, not averaged."""
        super().train(mode)
        self.heads.train(True)
        return self

    def forward(
        self, phase: str, *, images: Tensor | None = None, token_ids: Tensor | None = None, comm: Comm | None = None
    ) -> tuple[Tensor | None, Tensor] | Tensor:
        """phase: what to compute. Call it under torch.no_grad().

        scores: images [B, 3, h, w] -> (online-to-EMA target [B, P] or None, scores [B, N] fp32).
                Collective (batch norm): every rank must call
        image:  images [B, 3, H, W] -> normalised embeddings [B, E] fp32
        text:   token_ids [B, T] -> normalised embeddings [B, E] fp32
        """
        if phase == "scores":
            cls, scores = self.vision(images, with_scores=True)
            if "o2e_projector" not in self.heads:
                return None, scores
            return self.heads["o2e_projector"](cls, (comm or SingleProcess()).all_reduce_sum), scores
        if phase == "image":
            return normalise(self.image_projection(self.vision(images)))
        if phase == "text":
            return normalise(self.text_projection(self.text(token_ids)))
        raise ValueError(f"phase: {phase!r} is none of scores, image, text")


def mirrored_names(names: Iterable[str], compat: str) -> set[str]:
    """The teacher's parameters that are the student's current ones instead of an average.

    release: the published code leaves the EMA text side with the online token embedding, positions and last norm.
    paper: none.
    """
    if compat == "paper":
        return set()
    return {name for name in names if name.startswith(("text.embeddings.", "text.final_layer_norm."))}
