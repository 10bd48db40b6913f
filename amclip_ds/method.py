"""What a configuration's masks and objectives are, and what of the run follows from their declarations."""

from dataclasses import dataclass
from typing import Protocol

from amclip_ds import objectives
from amclip_ds.data.config import DataConfig
from amclip_ds.masks import MaskConfig, needs_of
from amclip_ds.masks.units import num_units
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig
from amclip_ds.objectives import OBJECTIVES, Chosen


class Settings(Protocol):
    """What decides a method: a TrainConfig has it all."""

    compat: str
    model: ModelConfig
    heads: HeadsConfig
    loss: LossConfig
    mask: MaskConfig
    data: DataConfig


@dataclass(frozen=True)
class Method:
    """Everything that depends on masks and objectives asks here; nothing else lists them."""

    objectives: Chosen
    """name -> options of those that are built"""
    masks: tuple[MaskConfig, ...]
    """by view"""
    grid: int
    """patches along a side of a view"""

    @property
    def mask_needs(self) -> frozenset[str]:
        """The fields of masks.MaskInputs that some view's mask reads."""
        return frozenset().union(*(needs_of(mask) for mask in self.masks))

    @property
    def wants(self) -> frozenset[str]:
        """What of the teacher's look is read: cls, patches, scores."""
        return objectives.wants_of(self.objectives) | (self.mask_needs & {"scores"})

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of the run reads the teacher."""
        return bool(self.wants) or any(OBJECTIVES[name].averaged for name in self.objectives)

    @property
    def draws(self) -> int:
        """Random numbers that a view's mask reads a sample, for each draw."""
        return num_units(self.grid, self.masks[0].unit) if "noise" in self.mask_needs else 0

    def groups(self) -> list[tuple[MaskConfig, tuple[int, ...]]]:
        """The views that share a mask, which the vision tower takes together."""
        found: list[tuple[MaskConfig, tuple[int, ...]]] = []
        for view, mask in enumerate(self.masks):
            known = [index for index, (other, _) in enumerate(found) if other == mask]
            if known:
                found[known[0]] = (mask, (*found[known[0]][1], view))
            else:
                found.append((mask, (view,)))
        return found


def method_of(config: Settings) -> Method:
    """The method that a configuration describes."""
    pairs_views = config.compat != "release"
    chosen = objectives.chosen(config.loss, config.heads, pairs_views)
    return Method(chosen, (config.mask,) * config.data.num_views, config.model.vision.grid)
