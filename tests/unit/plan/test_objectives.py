"""What is known of the objectives that ship, against their modules traced on the meta device; and others traced."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amclip_ds import config
from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.method import method_of
from amclip_ds.model.amclip import Sizes as ModelSizes
from amclip_ds.model.features import Features, Terms
from amclip_ds.objectives import OBJECTIVES
from amclip_ds.objectives.base import Objective, Weighted
from amclip_ds.plan import objectives, traced
from amclip_ds.plan.objectives import Sizes

SETTINGS = {
    "aclip": [],
    "layer": ["heads.norm=layer"],
    "sigmoid": ["loss.kind=sigmoid", "loss.o2o_weight=0"],
    "ring": ["loss.exchange=ring", "loss.chunk=16"],
    "sigmoid on a ring": ["loss.exchange=ring", "loss.kind=sigmoid"],
    "chunks": ["loss.chunk=16", "loss.o2e_weight=0"],
}


def sizes(settings: config.TrainConfig, local: int = 128, world: int = 3) -> Sizes:
    model = settings.model
    return Sizes(
        views=2,
        local=local,
        world=world,
        micro=local,
        width=768,
        text_width=model.text.width,
        embed_dim=model.embed_dim,
        bytes=2,
        kept=(100, 100),
        text_tokens=77,
        teacher_patches=196,
    )


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_known_is_what_is_traced(words: list[str]) -> None:
    settings = config.load("aclip-vitb16", words)
    known, built = objectives._known(settings, 768), traced.parts_of(settings, 768, 14, 16)
    assert list(known) == list(built) == list(method_of(settings).objectives)
    for name, part in known.items():
        other = built[name]
        assert part.parameters == other.parameters
        assert (part.averaged, part.targets, part.features, part.text) == (
            other.averaged,
            other.targets,
            other.features,
            other.text,
        )
        mine, theirs = part.cost(sizes(settings)), other.cost(sizes(settings))
        assert mine.flops == pytest.approx(theirs.flops, rel=1e-3), name
        assert mine.saved == pytest.approx(theirs.saved, rel=0.15, abs=4e6), name
        assert part.observed(sizes(settings)) == pytest.approx(other.observed(sizes(settings)))


def test_every_default_key_of_the_loss_is_known_here() -> None:
    """A new key with a weight takes the traced path; here is the list to extend, or not."""
    assert objectives._is_known(config.load("aclip-tiny"))
    for key in objectives.KNOWN_KEYS:
        assert hasattr(config.load("aclip-tiny").loss, key)


@dataclasses.dataclass
class Options(Weighted):
    hidden: int = 64


class PatchLoss(Objective):
    """Reads tokens and patches, has a head: as a user's own."""

    Options = Options
    features = frozenset({"cls", "patches", "tokens"})
    targets = frozenset({"cls", "patches"})
    averaged = ("head",)

    def __init__(self, options: Any, sizes: ModelSizes) -> None:
        super().__init__(options, sizes)
        self.head = nn.Linear(sizes.vision_width, options.hidden, bias=False)

    def observe(self, copies: nn.ModuleDict, seen: Any, comm: Comm) -> tuple[Tensor, ...]:
        return (copies["head"](seen.patches).mean(1),)

    def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
        assert features.patches is not None
        views = [self.head(view).mean(1) for view in features.patches]
        return {"patch": sum(((view - targets[0]) ** 2).mean() for view in views)}  # type: ignore[dict-item]


def model_sizes() -> ModelSizes:
    return ModelSizes(
        vision_width=768, text_width=512, embed_dim=512, grid=14, patch=16, context_length=77, vocab_size=99
    )


def test_an_objective_that_is_not_known_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "mine", PatchLoss)
    part = traced.part_of("mine", Options(weight=1.0), model_sizes())
    assert {name: p.shape for name, p in part.parameters.items()} == {"head.weight": (64, 768)}
    assert part.averaged == ("head",) and part.targets == {"cls", "patches"}
    of = dataclasses.replace(sizes(config.load("aclip-vitb16"), local=8), micro=4)
    forward = 2 * 4 * 2 * 100 * 768 * 64  # a piece, two views
    assert part.cost(of).flops == 2 * 3 * forward  # two pieces, forward and backward
    assert part.observed(of) == 2 * 8 * 196 * 768 * 64
    assert part.cost(of).saved >= 2 * 4 * 100 * 768 * 2  # the patches of both views


def test_an_objective_that_reads_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reads(PatchLoss):
        def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
            assert features.cls is not None
            return {"patch": features.cls.sum() * features.cls.mean().item()}

    monkeypatch.setitem(OBJECTIVES, "mine", Reads)
    part = traced.part_of("mine", Options(weight=1.0), model_sizes())
    with pytest.raises(UserError, match=r"loss\.mine: its cost cannot be traced without data"):
        part.cost(sizes(config.load("aclip-vitb16"), local=8))


def test_meta_ranks_keep_shapes() -> None:
    x = torch.empty(4, 3, device="meta")
    assert traced.MetaRanks(5).all_gather(x).shape == (20, 3)
