"""Online-to-EMA: BYOL's cosine between the views' predictions and the teacher's projection of its own crop.

Shapes: V views, B samples of this rank, P output of the heads.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import HeadsConfig
from amclip_ds.model.features import Features, Seen, Terms
from amclip_ds.model.heads import MLPHead, of_views
from amclip_ds.model.towers import normalise
from amclip_ds.objectives.base import Objective, Weighted


@dataclass
class Options(Weighted):
    heads: HeadsConfig = field(default_factory=HeadsConfig)


class BYOL(Objective):
    """Each view's class token, projected and predicted, against the averaged projector's view of the teacher's crop."""

    Options = Options
    features = frozenset({"cls"})
    targets = frozenset({"cls"})
    averaged = ("projector",)
    compiled_parts = ("of_predictions",)

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        heads = options.heads
        self.projector = MLPHead([sizes.vision_width, heads.hidden_dim, heads.output_dim], heads, bias=False)
        self.predictor = MLPHead([heads.output_dim, heads.hidden_dim, heads.output_dim], heads, bias=False)

    def observe(self, copies: nn.ModuleDict, seen: Seen, comm: Comm) -> tuple[Tensor, ...]:
        return (copies["projector"](seen.cls, comm.all_reduce_sum),)

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        assert features.cls is not None
        heads = self.options.heads
        projected = of_views(self.projector, features.cls, comm.all_reduce_sum, heads)
        predicted = of_views(self.predictor, projected, comm.all_reduce_sum, heads)
        return {"o2e": self.of_predictions(predicted, targets[0])}

    def of_predictions(self, predictions_VBP: Tensor, target_BP: Tensor) -> Tensor:
        """online_to_ema."""
        return online_to_ema(predictions_VBP, target_BP)


def online_to_ema(predictions_VBP: Tensor, target_BP: Tensor) -> Tensor:
    """Mean over the V * B rows of 2 - 2 cos(prediction, target); the target is each view's, and gets no gradient."""
    predictions, target = normalise(predictions_VBP), normalise(target_BP.detach())
    return (2 - 2 * (predictions * target).sum(-1)).mean()
