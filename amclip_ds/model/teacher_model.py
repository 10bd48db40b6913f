"""The teacher as a module: the parts of the student that it averages, under the same names.

Shapes: B samples, N patches of the teacher's crop, E embedding.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.compat import TEXT_ENDS
from amclip_ds.model.amclip import Sizes, no_objectives, sizes_of
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.features import Seen, Targets, check_targets
from amclip_ds.model.savings import Savings
from amclip_ds.model.towers import TwoTowers

OBSERVING = ("vision.", "objectives.")  # the parameters that `observe` reads; texts are for evaluations alone


class Observed(NamedTuple):
    """What the teacher's forward over its crop gave, as a tuple for ZeRO-3's hooks."""

    targets: Targets
    scores: Tensor | None
    """[B, N] fp32; of all views [V, B, N]"""


class TeacherModel(TwoTowers):
    """Never trained by gradient: every parameter has requires_grad False; call it under torch.no_grad()."""

    def __init__(
        self,
        model: ModelConfig,
        build_objectives: Callable[[Sizes], Mapping[str, nn.Module]] = no_objectives,
        savings: Savings | None = None,
    ) -> None:
        """build_objectives: as AClip's; of each, the submodules that it wants averaged become the teacher's."""
        super().__init__(model, savings)
        self.objectives = nn.ModuleDict()
        self._observers: dict[str, Any] = {}  # what is left of each objective: its `observe` and its options
        for name, objective in build_objectives(sizes_of(self.vision, model)).items():
            self._take(name, objective)
        self.requires_grad_(False)

    def _take(self, name: str, objective: Any) -> None:
        if not objective.reads_average() and not objective.averaged:
            return
        copies = nn.ModuleDict({part: getattr(objective, part) for part in objective.averaged})
        if copies:
            self.objectives[name] = copies
        for held in (objective._modules, objective._parameters, objective._buffers):
            held.clear()
        self._observers[name] = objective

    def train(self, mode: bool = True) -> "TeacherModel":
        """The copies' batch norm always normalises by the batch: its statistics are its own, not averaged."""
        super().train(mode)
        self.objectives.train(True)
        return self

    def observe(self, images: Tensor, wants: frozenset[str], comm: Comm, progress: float = 1.0) -> Observed:
        """images [B, 3, h, w] normalised, or all views [V, B, 3, h, w]: then V follows B in what is seen, and is first
        in the scores. wants: of cls, patches, scores. progress: how much of the run is done, 0 to 1.
        Collective: every rank must call."""
        views = images.shape[:-3]
        output = self.vision(images.flatten(0, -4), with_scores="scores" in wants, cls_only="patches" not in wants)
        scores = None if output.scores is None else output.scores.unflatten(0, views)
        patches = output.tokens[:, 1:] if "patches" in wants else None
        saw = (self.vision.feature(output.tokens), patches, output.scores)
        seen = Seen(*(None if part is None else samples_first(part.unflatten(0, views), len(views)) for part in saw))
        copies = {name: nn.ModuleDict() for name in self._observers} | dict(self.objectives.items())
        targets: Targets = {}
        for name, observer in self._observers.items():
            if not observer.is_on(progress):
                continue
            targets[name] = observer.observe(copies[name], seen, comm)
            check_targets(type(observer).observe, targets[name], views[-1])
        return Observed(targets, scores)


def samples_first(part: Tensor, dimensions: int) -> Tensor:
    """[B, ...] as it is; [V, B, ...] of two leading dimensions as [B, V, ...]."""
    return part if dimensions == 1 else part.transpose(0, 1)


def mirrored_names(names: Iterable[str], averages_text_ends: bool) -> set[str]:
    """The teacher's parameters that are the student's current ones instead of an average.

    averages_text_ends False: as the published code, which leaves the EMA text side with the online token embedding,
    positions and last norm. True: none.
    """
    if averages_text_ends:
        return set()
    return {name for name in names if name.startswith(TEXT_ENDS)}
