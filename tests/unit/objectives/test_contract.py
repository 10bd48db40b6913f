"""What an objective declares, it gets: each part of the contract (docs/add-your-own.md), on the modules themselves.

The same under ZeRO-3 with GradCache: tests/distributed/test_own_objective.py, tests/e2e/test_add_your_own.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amclip_ds.comm import SingleProcess
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import AClip
from amclip_ds.model.features import Encoded, Losses
from amclip_ds.model.init import constant, initialise
from amclip_ds.model.teacher_model import Observed, TeacherModel
from amclip_ds.objectives import OBJECTIVES, Objective, Weighted, builder, start_of
from tests.unit.model import tiny

BATCH = 3


@dataclass
class Options(Weighted):
    bonus: float = 0.25


class Everything(Objective):
    """Reads all there is, of the second view, and keeps what it was called with."""

    Options = Options
    features = frozenset({"cls", "eot", "image_embeds", "text_embeds", "logit_bias", "patches", "tokens"})
    targets = frozenset({"cls", "patches", "scores"})
    views = (1,)
    averaged = ("head",)
    init = {"scale": constant(3.0), r"centre": constant(0.5)}

    def __init__(self, options: Any, sizes: Any) -> None:
        super().__init__(options, sizes)
        self.sizes, self.calls = sizes, dict[str, Any]()
        self.head = nn.Linear(sizes.vision_width, 7)
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("centre", torch.zeros(7))

    def observe(self, copies: Any, seen: Any, comm: Any) -> tuple[Tensor, ...]:
        assert not list(self.parameters()) and not list(self.buffers()), "nothing of its own is where the teacher is"
        self.calls["observe"] = seen
        return copies["head"](seen.cls), seen.scores

    def per_sample(self, features: Any, targets: Any) -> dict[str, Tensor]:
        self.calls["per_sample"] = features, targets
        return {"one": self.head(features.patches[0]).square().mean() * self.scale.mean()}

    def forward(self, features: Any, targets: Any, comm: Any) -> dict[str, Tensor]:
        self.calls["forward"] = features, targets
        return {"two": features.image_embeds.mean() + self.options.bonus}

    def weight_of(self, term: str) -> float:
        return self.options.weight * (2 if term == "one" else 1)


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Everything]]:
    class Own(Everything):
        pass

    monkeypatch.setitem(OBJECTIVES, "own", Own)
    yield Own


def built(weight: float = 2.0) -> tuple[AClip, TeacherModel]:
    model, objectives = tiny.model_config(), {"own": Options(weight=weight)}
    pair = AClip(model, builder(objectives)), TeacherModel(model, builder(objectives))
    for module in pair:
        initialise(module, start_of(0, model, objectives))
    return pair


def passed() -> tuple[AClip, TeacherModel, Observed, Encoded, Losses]:
    """One pass of everything, with 4 of 16 tokens kept."""
    student, teacher = built()
    g = torch.Generator().manual_seed(1)
    images = torch.randn(2 * BATCH, 3, 32, 32, generator=g)
    token_ids = torch.randint(1, tiny.EOS, (BATCH, 8), generator=g)
    token_ids[:, 6:] = tiny.EOS
    kept = torch.arange(4).repeat(2 * BATCH, 1)
    with torch.no_grad():
        observed = teacher.observe(images[:BATCH], Everything.targets, SingleProcess())
    encoded = student.encode(tiny.inputs(images, token_ids, kept), observed.targets)
    losses = student.losses(
        encoded.cls, encoded.eot, observed.targets, encoded.terms, encoded.weighted, SingleProcess()
    )
    return student, teacher, observed, encoded, losses


def test_observe_sees_what_its_targets_name_and_runs_on_the_averaged_copies(kind: type[Everything]) -> None:
    student, teacher, observed, *_ = passed()
    seen = teacher._observers["own"].calls["observe"]
    assert seen.cls.shape == (BATCH, 32) and seen.patches.shape == (BATCH, 16, 32) and seen.scores.shape == (BATCH, 16)
    assert [name for name, _ in teacher.objectives.named_parameters()] == ["own.head.weight", "own.head.bias"]
    own = dict(student.named_parameters())
    for name, parameter in teacher.objectives.named_parameters(prefix="objectives"):
        assert torch.equal(parameter, own[name]) and not parameter.requires_grad
    torch.testing.assert_close(observed.targets["own"][0], teacher.objectives["own"]["head"](seen.cls))


def test_what_is_not_a_target_is_not_seen(kind: type[Everything]) -> None:
    kind.targets = frozenset({"cls"})
    _, teacher = built()
    kind.observe = lambda self, copies, seen, comm: self.calls.update(seen=seen) or (seen.cls,)  # type: ignore
    teacher.observe(torch.randn(BATCH, 3, 32, 32), kind.targets, SingleProcess())
    seen = teacher._observers["own"].calls["seen"]
    assert seen.patches is None and seen.scores is None


def test_per_sample_reads_tokens_and_patches_of_its_views(kind: type[Everything]) -> None:
    student, _, observed, encoded, _ = passed()
    features, targets = student.objectives["own"].calls["per_sample"]
    assert len(features.patches) == 1 and features.patches[0].shape == (BATCH, 4, 32)
    assert features.keep_indices[0].tolist() == [[0, 1, 2, 3]] * BATCH
    assert features.tokens.shape == (BATCH, 8, 32) and features.token_ids.shape == (BATCH, 8)
    assert torch.equal(features.cls, encoded.cls[1:]) and torch.equal(features.eot, encoded.eot["plain"])
    assert features.image_embeds is None and features.text_embeds is None
    assert targets is observed.targets["own"]


def test_forward_reads_embeddings_of_its_views_and_no_tokens(kind: type[Everything]) -> None:
    student, _, observed, encoded, _ = passed()
    features, targets = student.objectives["own"].calls["forward"]
    assert features.image_embeds.shape == (1, BATCH, 16) and features.text_embeds.shape == (BATCH, 16)
    assert features.logit_scale.shape == (1,) and features.logit_bias.shape == (1,)
    assert torch.equal(features.cls, encoded.cls[1:]) and features.patches is None and features.tokens is None
    assert targets is observed.targets["own"]


def test_what_is_not_named_is_none(kind: type[Everything]) -> None:
    kind.features = frozenset({"eot", "patches"})
    kind.forward = lambda self, features, targets, comm: self.calls.update(forward=features) or {}  # type: ignore
    student, *_ = passed()
    features, _ = student.objectives["own"].calls["per_sample"]
    assert features.cls is None and features.tokens is None and features.token_ids is None
    assert student.objectives["own"].calls["forward"].image_embeds is None and student.logit_bias is None


def test_the_loss_is_the_weighted_sum_of_its_terms(kind: type[Everything]) -> None:
    student, _, _, encoded, losses = passed()
    assert set(losses.terms) == {"one", "two"}
    torch.testing.assert_close(losses.total, 4 * losses.terms["one"] + 2 * losses.terms["two"])
    losses.total.backward()
    assert student.objectives["own"].head.weight.grad is not None and student.objectives["own"].scale.grad is not None


def test_its_rules_give_the_first_values_and_sizes_are_the_models(kind: type[Everything]) -> None:
    student, _ = built()
    own = student.objectives["own"]
    assert own.scale.tolist() == [3.0] and own.centre.tolist() == [0.5] * 7
    assert (own.sizes.vision_width, own.sizes.embed_dim, own.sizes.grid, own.sizes.patch) == (32, 16, 4, 8)
    kind.init = {"scale": constant(3.0)}
    with pytest.raises(UserError, match="no rule to initialise objectives.own.centre; an objective's `init` gives one"):
        built()
    kind.init = {"scale": constant(3.0), "centre": lambda draw, shape, model: torch.zeros(())}
    with pytest.raises(UserError, match=r"objectives.own.centre: its rule gave a first value of \[\]; it has \[7\]"):
        built()


WRONG: dict[str, tuple[str, Any, str]] = {
    "no dict": ("per_sample", lambda *given: torch.zeros(()), "gave a Tensor, not its terms"),
    "no tensor": ("per_sample", lambda *given: {"one": 3.0}, "its term 'one' is a float; a scalar tensor"),
    "no scalar": ("forward", lambda *given: {"two": torch.zeros(3)}, r"'two' is a torch.float32 of shape \[3\]"),
    "whole": ("forward", lambda *given: {"two": torch.tensor(3)}, "'two' is a torch.int64"),
    "nan": ("forward", lambda *given: {"two": torch.tensor(float("nan"))}, "gave two not finite, of finite features"),
    "nan of a sample": ("per_sample", lambda *given: {"one": torch.tensor(float("inf"))}, "gave one not finite"),
    "twice": ("forward", lambda *given: {"one": torch.zeros(())}, "another part of the loss has a term 'one' already"),
    "list": ("observe", lambda *given: [torch.zeros(BATCH)], "gave a list, not its targets: a tuple"),
    "rows": ("observe", lambda *given: (torch.zeros(2, 7),), rf"target 0 is \[2, 7\]; samples come first, {BATCH}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_return_is_one_line_that_names_the_part(case: str, kind: type[Everything]) -> None:
    part, gives, reported = WRONG[case]
    setattr(kind, part, gives)
    with pytest.raises(UserError, match=reported) as caught:
        passed()
    assert "\n" not in str(caught.value)


def test_what_is_not_finite_later_is_left_to_the_guards(kind: type[Everything]) -> None:
    """A first value may be blamed on the code; one in the middle of a week on the data: the guards skip it."""
    student, *_, encoded, losses = passed()
    student.objectives["own"].options.bonus = float("nan")
    again = student.losses(encoded.cls, encoded.eot, {}, {}, None, SingleProcess())
    assert again.total.isnan()


def test_features_that_are_not_finite_are_not_its_fault(kind: type[Everything]) -> None:
    student, _ = built()
    bad = torch.full((2, BATCH, 32), float("nan"))
    assert student.losses(bad, {"plain": torch.zeros(BATCH, 32)}, {}, {}, None, SingleProcess()).total.isnan()


def test_averaged_must_be_there(kind: type[Everything]) -> None:
    kind.averaged = ("tail",)
    with pytest.raises(UserError, match="averaged names tail, which is no submodule of it"):
        built()
