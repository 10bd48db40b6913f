"""Which patch tokens stay. A mask says how much each unit of tokens deserves to stay; the tower keeps the first K.

A mask is one file here and its line in MASKS. Nothing here loads torch, since reading a configuration imports this
package: a mask that needs torch's functions imports them inside its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from amclip_ds.masks import attentive, centered, cluster, disjoint, pgs, random, salience
from amclip_ds.masks.units import NONE

if TYPE_CHECKING:
    from torch import Tensor

STAGES = 8  # kept fractions of a run whose keep_ratio has a schedule, at most
INPUTS = frozenset({"noise", "noise2", "scores", "patches", "pixels"})


class MaskInputs(NamedTuple):
    """What a mask may read; a field is None unless its `needs` names it.

    B = views x samples, rows view-major; N patches of a view, U units (blocks of unit x unit patches), D width.
    """

    grid: int
    """patches along a side of a view: N = grid x grid"""
    unit: int
    """side of a unit in patches: U = (grid / unit) squared, row-major"""
    num_views: int
    """views among the rows"""
    noise: "Tensor | None" = None
    """[B, U] uniform in [0, 1), keyed by sample"""
    noise2: "Tensor | None" = None
    """[B, U] a second, independent draw"""
    scores: "Tensor | None" = None
    """[B, U] fp32: how much the teacher attends to each unit, seen from the view"""
    patches: "Tensor | None" = None
    """[B, N, D] patch embeddings with their positions, detached, in the dtype of the forward"""
    pixels: "Tensor | None" = None
    """[B, N, p * p * 3] fp32: the normalised pixels of each patch, row by row, the channel fastest"""
    progress: "Tensor | None" = None
    """0-d, on the device: how much of the run is done, 0 to 1"""


@dataclass(frozen=True)
class Mask:
    """One way to choose tokens."""

    priority: "Callable[[MaskInputs, Any], Tensor]"
    """(inputs, options) -> [B, U], one number a unit, the larger stays; of equal ones the first unit"""
    needs: frozenset[str] = frozenset()
    """the fields of MaskInputs that it reads (grid, unit, num_views and progress are always there)"""
    options: type | None = None
    """a dataclass; its keys are mask.NAME.*"""
    disjoint: bool = False
    """the first view takes the first K of its order, the next view the next K: sets without a common unit, where the
    priorities of a sample's views are equal"""

    def __post_init__(self) -> None:
        if unknown := sorted(self.needs - INPUTS):
            raise ValueError(f"a mask cannot have {', '.join(unknown)}; there are {', '.join(sorted(INPUTS))}")


MASKS: dict[str, Mask] = {
    "random": Mask(random.priority, needs=frozenset({"noise"})),
    "attentive": Mask(attentive.priority, needs=frozenset({"scores"})),
    "attentive_inverse": Mask(attentive.inverse, needs=frozenset({"scores"})),
    "attentive_noise": Mask(salience.attentive, frozenset({"scores", "noise"}), salience.AttentiveOptions),
    "centered": Mask(centered.priority, frozenset({"noise"}), centered.Options),
    "cluster": Mask(cluster.priority, frozenset({"noise", "noise2", "pixels"}), cluster.Options),
    "pgs": Mask(pgs.priority, frozenset({"noise", "noise2", "pixels", "patches"}), pgs.Options),
    "salience": Mask(salience.priority, frozenset({"noise", "patches"}), salience.Options),
    "disjoint": Mask(disjoint.priority, frozenset({"noise"}), disjoint=True),
}


@dataclass
class MaskConfig:
    strategy: str = "attentive"
    """none | random | attentive | attentive_inverse (removes what the teacher attends to: the paper's ablation) |
    attentive_noise | centered | cluster | pgs | salience | disjoint."""
    keep_ratio: float = 0.5
    """Fraction of the patch tokens kept, in (0, 1]. At 0.5 a 14 x 14 grid with unit 2 keeps 100 of 196 tokens."""
    unit: int = 2
    """Side of the block of tokens kept or removed together; must divide the patch grid."""
    schedule: str = "constant"
    """constant | linear | cosine: how the kept fraction goes from keep_ratio to final_keep_ratio, in 8 steps."""
    final_keep_ratio: float | None = None
    """Fraction kept at the end of the run, where schedule is not constant."""

    def __post_init__(self) -> None:
        self._check_schedule()
        if self.strategy not in (NONE, *MASKS):
            raise ValueError(f"mask.strategy: {self.strategy!r} is none of {', '.join((NONE, *MASKS))}")
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(f"mask.keep_ratio: {self.keep_ratio} is outside (0, 1]")
        if self.unit < 1:
            raise ValueError(f"mask.unit: {self.unit} must be at least 1")

    def _check_schedule(self) -> None:
        final = self.final_keep_ratio
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"mask.schedule: {self.schedule!r} is none of constant, linear, cosine")
        if final is not None and not 0.0 < final <= 1.0:
            raise ValueError(f"mask.final_keep_ratio: {final} is outside (0, 1]")
        if (final is None) != (self.schedule == "constant"):
            said = "needs it" if final is None else "keeps mask.keep_ratio throughout; take linear or cosine"
            raise ValueError(f"mask.final_keep_ratio: mask.schedule={self.schedule} {said}")

    def at(self, progress: float) -> "MaskConfig":
        """The mask as it is when so much of the run is done, 0 to 1, with a keep_ratio that does not change.

        A run has at most STAGES ratios, since every number of tokens is another shape to compile and to plan for; the
        first is keep_ratio, the last final_keep_ratio, and each holds for as many steps.
        """
        if self.final_keep_ratio is None:
            return self
        part = min(int(progress * STAGES), STAGES - 1) / (STAGES - 1)
        if self.schedule == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        ratio = self.keep_ratio + (self.final_keep_ratio - self.keep_ratio) * part
        return replace(self, keep_ratio=ratio, schedule="constant", final_keep_ratio=None)

    def at_most(self) -> "MaskConfig":
        """The mask as it is when it keeps most: what memory has to hold."""
        return self.at(1.0 if (self.final_keep_ratio or 0.0) > self.keep_ratio else 0.0)


@dataclass
class ViewMask:
    """What the mask of one view has of its own; what is left out is that of `mask`."""

    strategy: str = ""
    """As mask.strategy, for this view; empty: mask.strategy."""
    keep_ratio: float | None = None
    """As mask.keep_ratio, for this view; null: mask.keep_ratio."""
    unit: int | None = None
    """As mask.unit, for this view; null: mask.unit."""
    schedule: str = ""
    """As mask.schedule, for this view; empty: mask.schedule."""
    final_keep_ratio: float | None = None
    """As mask.final_keep_ratio, for this view; null: mask.final_keep_ratio."""

    def over(self, base: MaskConfig) -> MaskConfig:
        """`base` with this view's own keys in it. Raises ValueError whose text begins with `mask.KEY`."""
        own = {item.name: value for item in fields(self) if (value := getattr(self, item.name)) not in (None, "")}
        if self.schedule == "constant":
            own.setdefault("final_keep_ratio", None)  # the end of a schedule that is not this view's
        return replace(base, **own)


def masks_of_views(base: MaskConfig, own: Sequence[ViewMask]) -> tuple[MaskConfig, ...]:
    """Each view's mask, complete. Raises ValueError whose text begins with `data.views.N.mask.KEY`."""
    found = []
    for place, mask in enumerate(own):
        try:
            found.append(mask.over(base))
        except ValueError as error:
            raise ValueError(f"data.views.{place}.{error}") from None
    return tuple(found)


def needs_of(config: MaskConfig) -> frozenset[str]:
    """What the configured mask reads."""
    return frozenset() if config.strategy == NONE else MASKS[config.strategy].needs


def options_of(config: MaskConfig) -> Any:
    """The configured mask's options: mask.NAME.*, else its defaults; None where it has none."""
    kind = MASKS[config.strategy].options
    return getattr(config, config.strategy, None) or (kind() if kind else None)
