"""The objectives: parts of the loss, each one file here and its line in OBJECTIVES; and which of them a run builds."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from amclip_ds.errors import UserError, name_of
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import FLAT_OBJECTIVES, HeadsConfig, LossConfig, ModelConfig, Weighted
from amclip_ds.model.features import FROZEN, FROZEN_IMAGES, Features, Seen, Targets, Terms
from amclip_ds.model.init import LOGIT_SCALE, Start
from amclip_ds.objectives import base, byol, contrastive, simclr
from amclip_ds.objectives.base import Objective
from amclip_ds.objectives.byol import BYOL
from amclip_ds.objectives.clipkd import ClipKD
from amclip_ds.objectives.contrastive import Contrastive
from amclip_ds.objectives.detailclip import DetailCLIP
from amclip_ds.objectives.mlm import MLM
from amclip_ds.objectives.occlusion import Occlusion
from amclip_ds.objectives.patches import Patches
from amclip_ds.objectives.sigmoid import Sigmoid
from amclip_ds.objectives.simclr import SimCLR

OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "sigmoid": Sigmoid,
    "simclr": SimCLR,
    "byol": BYOL,
    "occlusion": Occlusion,
    "clipkd": ClipKD,
    "patches": Patches,
    "mlm": MLM,
    "detailclip": DetailCLIP,
}  # in the order in which their terms are summed
__all__ = ["OBJECTIVES", "Features", "Objective", "Seen", "Terms", "Weighted", "build", "builder", "chosen"]
RECORDED = ("contrastive", "o2o", "o2e")  # terms of which every run has a number, 0 where the objective is not built

Chosen = Mapping[str, Any]
"""The objectives that a run builds: name -> options, in the order of OBJECTIVES."""


def chosen(
    loss: LossConfig,
    heads: HeadsConfig,
    pairs_views: bool = True,
    has_masked_text: bool = False,
    gathers_gradient: bool = True,
) -> Chosen:
    """The objectives that have a weight. has_masked_text: data.text_mask makes one.

    pairs_views, gathers_gradient: False is A-CLIP's, SLIP's published code, for a method that loss.release says is
    theirs.
    """
    text = loss.text if has_masked_text else "plain"
    pairs_views = pairs_views or loss.release != "aclip"
    gathers_gradient = gathers_gradient or loss.release != "slip"
    image_text = "sigmoid" if loss.kind == "sigmoid" else "contrastive"
    options: dict[str, Any] = {
        image_text: contrastive.Options(
            loss.contrastive_weight,
            loss.views,
            chunk=loss.chunk,
            text=text,
            exchange=loss.exchange,
            gathers_gradient=gathers_gradient,
        ),
        "simclr": simclr.Options(
            loss.o2o_weight,
            loss.o2o_views,
            temperature=loss.o2o_temperature,
            chunk=loss.chunk,
            pairs_views=pairs_views,
            exchange=loss.exchange,
            heads=heads,
        ),
        "byol": byol.Options(loss.o2e_weight, loss.o2e_views, heads=heads),
    }
    options |= {name: getattr(loss, name) for name in OBJECTIVES if name not in FLAT_OBJECTIVES and hasattr(loss, name)}
    options["detailclip"] = loss.detailclip.sized(heads)
    return {name: options[name] for name in OBJECTIVES if name in options and options[name].weight > 0}


def build(objectives: Chosen, sizes: Sizes) -> dict[str, Objective]:
    """The objectives as modules, in the order of OBJECTIVES."""
    built = {name: OBJECTIVES[name](options, sizes) for name, options in objectives.items()}
    for objective in built.values():
        if missing := [part for part in objective.averaged if part not in objective._modules]:
            raise UserError(
                f"{name_of(type(objective))}: averaged names {', '.join(missing)}, which is no submodule of it"
            )
    return built


def builder(objectives: Chosen) -> Callable[[Sizes], dict[str, Objective]]:
    """What AClip and TeacherModel take: they know the sizes."""
    return partial(build, objectives)


def texts_of(objectives: Chosen) -> frozenset[str]:
    """The forms of the texts that they read: `plain` where there is none."""
    found = {OBJECTIVES[name].text_pass_of(options) for name, options in objectives.items()} - {None}
    return frozenset(str(name) for name in found or {"plain"})


def wants_of(objectives: Chosen) -> frozenset[str]:
    """What of the teacher their `observe` reads."""
    return frozenset().union(*(OBJECTIVES[name].targets for name in objectives)) - set(FROZEN)


def begun(objectives: Chosen, progress: float) -> Chosen:
    """Those that have begun when so much of the run is done, 0 to 1."""
    return {name: options for name, options in objectives.items() if progress >= base.start_of(options)}


def views_of(name: str, options: Any) -> tuple[int, ...] | None:
    """The views that an objective reads; None: all."""
    if not OBJECTIVES[name].reads_views():
        return ()
    chosen = getattr(options, "views", None)
    return tuple(chosen) if chosen else OBJECTIVES[name].views


def with_frozen(objectives: Chosen, targets: Targets, embedded: Mapping[str, Tensor]) -> Targets:
    """The targets, each objective's followed by what it reads of distill.teacher. embedded: as FrozenTeacher.embed."""
    found = dict(targets)
    for name, options in objectives.items():
        kind = OBJECTIVES[name]
        views = list(getattr(options, "views", None) or kind.views or range(embedded[FROZEN_IMAGES].shape[1]))
        held = {**embedded, FROZEN_IMAGES: embedded[FROZEN_IMAGES][:, views]}
        found[name] = (*targets.get(name, ()), *(held[part] for part in FROZEN if part in kind.targets))
    return found


def start_of(seed: int, model: ModelConfig, objectives: Chosen) -> Start:
    """How the first weights of a run are made."""
    rules, scale = [], LOGIT_SCALE
    for name in objectives:
        kind = OBJECTIVES[name]
        rules += [(rf"objectives\.{re.escape(name)}\.(?:{pattern})", rule) for pattern, rule in kind.init.items()]
        scale = kind.logit_scale if kind.logit_scale is not None else scale
    return Start(seed, model, scale, tuple(rules))
