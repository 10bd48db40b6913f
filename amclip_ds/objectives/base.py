"""What an objective is: what it reads, which heads it has, what the teacher makes for it, and its terms of the loss."""

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import Weighted
from amclip_ds.model.features import FROZEN, Features, Seen, Terms
from amclip_ds.model.init import Rule

OF_TEXTS = frozenset({"eot", "text_embeds", "text_projected", "tokens", "vocabulary"})
FEATURES = OF_TEXTS | {"cls", "image_embeds", "image_projected", "logit_bias", "patches", "pixels"}
TEXT_PASSES = ("plain", "masked", "cloze")  # masked: as data.text_mask makes it; cloze: masks/text/cloze.py
TARGETS = frozenset({"cls", "patches", "scores", *FROZEN})
LOOKS = ("crop", "views")


class Objective(nn.Module):
    """One part of the loss. It lives in AClip.objectives, and its heads are its submodules: sharding, first weights,
    the average and checkpoints see them.

    A subclass says what it reads by the class variables below, and returns terms: name -> scalar, unweighted, recorded
    as loss_NAME.
    """

    Options: ClassVar[type] = Weighted
    """a dataclass with a `weight`; its keys are loss.NAME.*"""
    features: ClassVar[frozenset[str]] = frozenset()
    """of FEATURES; patches, pixels, tokens and vocabulary are seen by per_sample alone, embeddings by forward alone"""
    targets: ClassVar[frozenset[str]] = frozenset()
    """of TARGETS: what `observe` reads of the teacher; frozen_images [B, V, E] of its views, frozen_texts [B, E] and
    frozen_scale [B, 1] are distill.teacher's embeddings and logit scale, and follow what `observe` gives"""
    sees: ClassVar[str] = "crop"
    """of LOOKS, as teacher.sees: what the teacher must look at, where `observe` reads it"""
    views: ClassVar[tuple[int, ...] | None] = None
    """the places in data.views that it reads; None: all"""
    text: ClassVar[str] = "plain"
    """of TEXT_PASSES: the form of the texts that it reads, where its features are of texts; cloze is loss.mlm's own"""
    averaged: ClassVar[tuple[str, ...]] = ()
    """the submodules of which the teacher keeps an average"""
    init: ClassVar[dict[str, Rule]] = {}
    """pattern of a parameter's or buffer's name in here -> its first value; what __init__ fills is overwritten"""
    logit_scale: ClassVar[float | None] = None
    """where the model's logit_scale starts, if this objective has a say"""

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__()
        self.options = options

    @property
    def chosen_views(self) -> tuple[int, ...] | None:
        """The views that it reads: those of its options, else of its class."""
        chosen = getattr(self.options, "views", None)
        return tuple(chosen) if chosen else self.views

    @property
    def text_pass(self) -> str | None:
        """The form of the texts that it reads; None: it reads none."""
        return self.text_pass_of(self.options)

    @classmethod
    def text_pass_of(cls, options: Any) -> str | None:
        """The same, of its options or else its class."""
        return getattr(options, "text", cls.text) if cls.features & OF_TEXTS else None

    @classmethod
    def reads_views(cls) -> bool:
        """Whether it reads anything but texts."""
        return bool(cls.features - OF_TEXTS or cls.targets)

    @classmethod
    def reads_frozen(cls) -> bool:
        """Whether it reads distill.teacher."""
        return bool(cls.targets & set(FROZEN))

    @classmethod
    def reads_average(cls) -> bool:
        """Whether `observe` reads what the averaged teacher sees."""
        return bool(cls.targets - set(FROZEN))

    @classmethod
    def changes_at(cls, options: Any) -> tuple[float, ...]:
        """The shares of the run at which its terms become others: where it begins, or a temperature of it changes."""
        return (start_of(options),)

    def is_on(self, progress: float) -> bool:
        """Whether it has begun when so much of the run is done, 0 to 1."""
        return progress >= start_of(self.options)

    def weight_of(self, term: str) -> float:
        """The weight of one of its terms."""
        return self.options.weight

    def observe(self, copies: nn.ModuleDict, seen: Seen, comm: Comm) -> tuple[Tensor, ...]:
        """Its targets, samples first, of what the teacher saw; no gradient. copies: averages of `averaged`, by name.

        Runs where the teacher is: nothing of this module's own may be read. Collective: every rank must call.
        """
        return ()

    def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
        """Terms that are means over samples, of some of them: called once a piece of the batch, without collectives."""
        return {}

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        """Terms of this rank's whole batch. Collective: every rank must call."""
        return {}

    def commit(self, comm: Comm) -> None:
        """After each applied step: moves state (buffers) such as centres, alike on every rank. Collective."""


def start_of(options: Any) -> float:
    """The share of the run after which an objective begins."""
    return float(getattr(options, "start", 0.0))


def check_declarations(kind: Any, who: str) -> None:
    """Whether a class may be an objective. Raises UserError, in one line, for what it declares wrongly."""
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(f"{who} is no subclass of amclip_ds.objectives.Objective")
    for name, allowed in (("features", FEATURES), ("targets", TARGETS)):
        declared = getattr(kind, name)
        if isinstance(declared, str) or not isinstance(declared, Collection):
            raise UserError(f"{who}: {name} is no set of names; write frozenset({{...}})")
        if unknown := sorted(map(str, set(declared) - allowed)):
            raise UserError(f"{who}: {name} asks for {', '.join(unknown)}; there are {', '.join(sorted(allowed))}")
    if isinstance(kind.averaged, str):
        raise UserError(f"{who}: averaged is no tuple of names; write ({kind.averaged!r},)")
    if kind.views is not None and not all(isinstance(view, int) and view >= 0 for view in kind.views):
        raise UserError(f"{who}: views are places in data.views, from 0 on; None: all")
    if kind.sees not in LOOKS:
        raise UserError(f"{who}: sees is {kind.sees!r}, and there are {' and '.join(LOOKS)}")
    if kind.text not in TEXT_PASSES[:2]:
        raise UserError(f"{who}: text is {kind.text!r}, and there are {' and '.join(TEXT_PASSES[:2])}")
    if "weight" not in getattr(kind.Options, "__dataclass_fields__", {}) or kind.Options().weight != 0:
        raise UserError(
            f"{who}: Options needs a `weight` that is 0 by default: derive it from Weighted, as a dataclass"
        )
