"""The batch in pieces has the whole batch's gradients, also with views of several masks and two text passes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.grad_cache import forward_backward
from amclip_ds.masks import MaskConfig, MaskInputs
from amclip_ds.masks.selection import Selection
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import LossConfig
from amclip_ds.model.features import Features, StudentInputs, Terms, ViewGroup
from amclip_ds.model.init import initialise
from amclip_ds.objectives import build, chosen, start_of
from amclip_ds.objectives.base import Objective
from tests.unit.model import tiny

SAMPLES, GRID, UNITS = 8, 4, 4


class Words(Objective):
    """Reads the tokens of the plain texts and the patches of the last view, once a piece."""

    features = frozenset({"tokens", "patches"})
    views = (2,)

    def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
        assert features.tokens is not None and features.patches is not None and len(features.patches) == 1
        return {"words": (features.tokens.mean(1).pow(2).sum(-1) + features.patches[0].mean(1).sum(-1)).mean()}


class Plain:
    """What forward_backward asks of an engine, of a module in one process."""

    def __init__(self, module: AClip) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self.module, name)

    def losses(self, cls: Tensor, eot: dict[str, Tensor], *more: Any) -> Any:
        """As ZeRO-3's hooks do, which put the outputs of a function of theirs into the dict."""
        for name, feature in list(eot.items()):
            eot[name] = feature.view_as(feature)
        return self.module.losses(cls, eot, *more)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextlib.contextmanager
    def accumulate_gradients(self) -> Iterator[None]:
        yield


def student(alone: bool = False) -> AClip:
    """alone: with Words and nothing else."""
    model, heads = tiny.model_config(), tiny.HeadsConfig(hidden_dim=24, output_dim=12)
    objectives = {} if alone else chosen(LossConfig(o2o_views=[0, 1], views=[0, 2]), heads, has_masked_text=True)
    built = AClip(model, lambda sizes: {**build(objectives, sizes), "words": Words(Words.Options(weight=0.5), sizes)})
    initialise(built, start_of(0, model, objectives))
    return built


def inputs() -> StudentInputs:
    """Views 0 and 1 keep half of their tokens, by another mask each; view 2 keeps a quarter."""
    torch.manual_seed(1)
    images = torch.randn(3, SAMPLES, 3, 32, 32)
    half, quarter = MaskConfig("random", 0.5), MaskConfig("random", 0.25)
    scores = MaskConfig("attentive", 0.5)
    first = Selection(half, MaskInputs(GRID, 2, 1, noise=torch.rand(SAMPLES, UNITS)), (0,))
    second = Selection(scores, MaskInputs(GRID, 2, 1, scores=torch.rand(SAMPLES, UNITS)), (1,))
    third = Selection(quarter, MaskInputs(GRID, 2, 1, noise=torch.rand(SAMPLES, UNITS)), (0,))
    texts = {name: torch.randint(1, 99, (SAMPLES, length)) for name, length in (("plain", 10), ("masked", 5))}
    for held in texts.values():
        held[:, -1] = tiny.EOS
    return StudentInputs((ViewGroup((0, 1), images[:2], (first, second)), ViewGroup((2,), images[2:], (third,))), texts)


def gradients(
    micro: int, alone: bool = False, factor: float = 1.0
) -> tuple[dict[str, Tensor], Any, list[Tensor | None]]:
    module = student(alone)
    given = (inputs(), {} if alone else tiny.targets(SAMPLES), SingleProcess(), micro)
    losses, kept = forward_backward(Plain(module), *given, admit=lambda losses: factor)  # type: ignore[arg-type]
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, losses, kept


def test_pieces_have_the_whole_batch_s_gradients_and_choices() -> None:
    whole, losses, kept = gradients(SAMPLES)
    assert set(losses.terms) == {"contrastive", "o2o", "o2e", "words"} and set(losses.eot) == {"plain", "masked"}
    assert [tuple(rows.shape) for rows in kept if rows is not None] == [(2, SAMPLES, 8), (1, SAMPLES, 4)]
    for micro in (4, 3, 2):  # by threes the last piece is smaller
        pieces, again, kept_again = gradients(micro)
        torch.testing.assert_close(again.total, losses.total, rtol=1e-5, atol=1e-6)
        assert pieces.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(
                pieces[name], gradient, rtol=1e-4, atol=1e-7 + 1e-5 * float(gradient.abs().max())
            )
        for one, other in zip(kept, kept_again):
            assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("alone", [False, True], ids=["with others", "alone"])
def test_the_verdict_reaches_every_gradient_of_the_pieces(alone: bool) -> None:
    """That of means over samples too, which do not go through the cached features: or a refused step would be taken.
    Alone, they leave the batch as a whole without any gradient."""
    whole, *_ = gradients(SAMPLES, alone)
    halved, *_ = gradients(2, alone, factor=0.5)
    refused, *_ = gradients(2, alone, factor=float("nan"))
    assert whole.keys() == halved.keys() == refused.keys() and len(whole) > 20
    for name, gradient in whole.items():
        tolerance = 1e-7 + 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(halved[name], gradient / 2, rtol=1e-4, atol=tolerance)
    assert all(gradient.isnan().any() for gradient in refused.values())


def test_a_loss_that_reads_masked_texts_leaves_the_plain_ones_alone() -> None:
    """The image-text loss has no gradient by a word that only the plain texts hold; without it in a piece, the same."""
    module = student()
    del module.objectives["words"]
    given = inputs()
    given.texts["plain"][:], given.texts["masked"][:, :-1] = 50, 51
    given.texts["plain"][:, -1] = tiny.EOS
    forward_backward(Plain(module), given, tiny.targets(SAMPLES), SingleProcess(), 2)  # type: ignore[arg-type]
    gradient = module.text.embeddings.token_embedding.weight.grad
    assert gradient is not None and gradient[51].abs().sum() > 0 and not gradient[50].any()
