"""What a configuration's masks and objectives are, and what of the run follows from their declarations."""

from dataclasses import dataclass, replace
from typing import Protocol

from amclip_ds import objectives
from amclip_ds.compat import COMPAT, Compat
from amclip_ds.data.config import DataConfig
from amclip_ds.masks import MaskConfig, masks_of_views, needs_of
from amclip_ds.masks.units import NONE, num_kept, num_units
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig, TeacherConfig
from amclip_ds.objectives import OBJECTIVES, Chosen


class Settings(Protocol):
    """What decides a method: a TrainConfig has it all."""

    compat: str
    model: ModelConfig
    heads: HeadsConfig
    loss: LossConfig
    mask: MaskConfig
    data: DataConfig
    teacher: TeacherConfig


NOISE = frozenset({"noise", "noise2"})


@dataclass(frozen=True)
class Group:
    """Views that the vision tower takes together, since they keep equally many tokens."""

    masks: tuple[tuple[MaskConfig, tuple[int, ...]], ...]
    """each mask with its views"""

    @property
    def views(self) -> tuple[int, ...]:
        """All of them, ascending."""
        return tuple(sorted(view for _, views in self.masks for view in views))


@dataclass(frozen=True)
class Method:
    """Everything that depends on masks and objectives asks here; nothing else lists them."""

    objectives: Chosen
    """name -> options of those that are built"""
    masks: tuple[MaskConfig, ...]
    """by view"""
    grid: int
    """patches along a side of a view"""
    compat: Compat = COMPAT["paper"]
    """what is done as A-CLIP's published code does it"""
    teacher_view: int | None = None
    """the view that the teacher sees; None: a crop of its own"""
    sees_views: bool = False
    """whether it sees all views instead"""
    always_averages: bool = False
    """whether the average is kept even where nothing reads it"""

    @property
    def has_teacher_crop(self) -> bool:
        """Whether samples carry a crop for the teacher alone."""
        return self.reads_teacher and self.teacher_view is None and not self.sees_views

    @property
    def mask_needs(self) -> frozenset[str]:
        """The fields of masks.MaskInputs that some view's mask reads."""
        return frozenset().union(*(needs_of(mask) for mask in self.masks))

    @property
    def wants(self) -> frozenset[str]:
        """Which of the teacher's outputs are read: cls, patches, scores."""
        return objectives.wants_of(self.objectives) | (self.mask_needs & {"scores"})

    def at(self, progress: float) -> "Method":
        """Without the objectives that have not begun when so much of the run is done, 0 to 1, and without the last
        views where nothing else reads them."""
        on = objectives.begun(self.objectives, progress)
        if len(on) == len(self.objectives):
            return self
        read = [objectives.views_of(name, options) for name, options in on.items()]
        every = range(len(self.masks))
        last = max(max(every if views is None else views, default=0) for views in read)
        return replace(self, objectives=on, masks=self.masks[: last + 1])

    def changes(self, before: float, now: float) -> bool:
        """Whether between two shares of the run the loss gets other parts, or the views another number of tokens."""
        shares = [share for name, options in self.objectives.items() for share in OBJECTIVES[name].changes_at(options)]
        kept = [[num_kept(mask.at(progress), self.grid) for mask in self.masks] for progress in (before, now)]
        return any(before < share <= now for share in shares) or kept[0] != kept[1]

    @property
    def texts(self) -> frozenset[str]:
        """The forms of the texts that are read, of objectives.base.TEXT_PASSES."""
        return objectives.texts_of(self.objectives)

    @property
    def hidden_share(self) -> float:
        """Of a text's words that are hidden in its cloze form; 0: no objective reads it."""
        return float(self.objectives["mlm"].share) if "mlm" in self.objectives else 0.0

    @property
    def reads_frozen(self) -> bool:
        """Whether some objective reads distill.teacher."""
        return any(OBJECTIVES[name].reads_frozen() for name in self.objectives)

    @property
    def reads_teacher(self) -> bool:
        """Whether any mask or objective reads the teacher."""
        return bool(self.wants) or any(OBJECTIVES[name].averaged for name in self.objectives)

    @property
    def needs_teacher(self) -> bool:
        """Whether the run has a teacher: something reads it, or its average is wanted for itself."""
        return self.reads_teacher or self.always_averages

    @property
    def draws(self) -> int:
        """Random numbers of a draw, for each view of a sample: one for each unit of the finest mask that reads any."""
        return max((num_units(self.grid, mask.unit) for mask in self.masks if needs_of(mask) & NOISE), default=0)

    @property
    def draws_twice(self) -> bool:
        """Whether some mask reads a second draw."""
        return "noise2" in self.mask_needs

    def groups(self, progress: float) -> list[Group]:
        """The views that keep equally many tokens when so much of the run is done, 0 to 1; in the order of views."""
        now = [mask.at(progress) for mask in self.masks]
        numbers = [num_kept(mask, self.grid) for mask in now]
        found = []
        for number in dict.fromkeys(numbers):
            views = [view for view, kept in enumerate(numbers) if kept == number]
            masks = [now[view] for view in views]
            different = [mask for place, mask in enumerate(masks) if mask not in masks[:place]]
            found.append(Group(tuple((mask, tuple(view for view in views if now[view] == mask)) for mask in different)))
        return found


def method_of(config: Settings) -> Method:
    """The method that a configuration describes."""
    compat = COMPAT[config.compat]
    masks_text = config.data.text_mask.strategy != NONE
    chosen = objectives.chosen(config.loss, config.heads, compat.pairs_views, masks_text, compat.gathers_gradient)
    masks = masks_of_views(config.mask, config.data.view_masks())
    teacher = config.teacher
    return Method(
        chosen, masks, config.model.vision.grid, compat, teacher.view, teacher.sees == "views", teacher.always
    )
