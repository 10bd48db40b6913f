"""Compiled parts beside the plain ones: more shapes than torch keeps graphs of, and towers that recompute blocks."""

import errno
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from amclip_ds.engine import compile as compiling
from amclip_ds.engine.compile import Compiled, compile_towers
from amclip_ds.model.config import TextConfig, VisionConfig
from amclip_ds.model.text import TextTower
from amclip_ds.model.vision import VisionTower
from tests.unit.model import tiny


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()


class Graphs:
    """A backend that compiles nothing: which lengths it was given, and which its graphs ran."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.ran: list[int] = []

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        length = next(len(given) for given in inputs if isinstance(given, Tensor))
        self.made.append(length)

        def run(*given: Any) -> Any:
            self.ran.append(length)
            return graph.forward(*given)

        return run


def doubled(x: Tensor) -> Tensor:
    return x * 2


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_shapes_than_graphs_are_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The graphs that there are stay in use; a further shape is said once, by us and by torch."""
    graphs = Graphs()
    monkeypatch.setattr(compiling, "BACKEND", graphs)
    part = Compiled(doubled, "the part")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (3, 4, 5, 3, 5, 6, 4):
            assert torch.equal(part(torch.ones(length)), torch.full((length,), 2.0))
    assert graphs.made == [3, 4] and graphs.ran == [3, 4, 3, 4]
    assert part.failed is None
    [said] = [str(warning.message) for warning in caught]
    assert said.startswith("engine.compile: the part has as many graphs as torch keeps of one function (2)")
    assert sum("recompile_limit" in record.message for record in caplog.records) == 1


def without_backward(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that cannot compile the backward of what is as large as a tower."""
    from torch._dynamo.backends.common import aot_autograd

    def refuse(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        if len(graph.graph.nodes) > 50:
            raise NotImplementedError("no such backward")
        return plain(graph, inputs)

    def plain(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=plain, bw_compiler=refuse)(graph, inputs)


@pytest.mark.parametrize("mode", ["tower", "block"])
def test_a_backward_that_cannot_be_compiled_ends_no_run(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """It fails in its forward's call, which then runs as it was: the gradients are the plain model's."""
    monkeypatch.setattr(compiling, "BACKEND", without_backward)
    plain, model = tiny.student(), tiny.student()
    lazily = torch._functorch.config.patch(force_non_lazy_backward_lowering=False)
    with lazily, pytest.warns(UserWarning, match="runs uncompiled.*no such backward"):
        assert compile_towers(model, mode) is None
        found = passed(model, model.text, TEXTS)
    assert not differences(passed(plain, plain.text, TEXTS), found)


def test_a_compiler_that_fails_on_one_rank_leaves_word_for_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose cache another node replaces."""

    def stale(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(compiling, "BACKEND", stale)
    monkeypatch.setattr(compiling, "FALLEN_BACK", [])
    part = Compiled(doubled, "the part")
    with pytest.warns(UserWarning, match="engine.compile: the part runs uncompiled"):
        assert torch.equal(part(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(part(torch.ones(4)), torch.full((4,), 2.0))
    [said] = compiling.FALLEN_BACK
    assert said.startswith("the part runs uncompiled (BackendCompilerFailed") and "Stale file handle" in said


class Pass(NamedTuple):
    """A forward and backward of a part of a tower."""

    values: list[Tensor]
    gradients: dict[str, Tensor]
    """of a sum over the values, by parameter"""
    kept: int
    """bytes that waited for the backward, weights apart"""


def passed(tower: nn.Module, part: Callable[..., Any], *given: Any) -> Pass:
    weights = {parameter.data_ptr() for parameter in tower.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = part(*given)
    values = [value for value in (found if isinstance(found, tuple) else (found,)) if value is not None]
    sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in values).backward()
    gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    return Pass(values, gradients, sum(size for place, size in kept.items() if place not in weights))


def differences(one: Pass, other: Pass) -> list[str]:
    """Values and parameters' gradients that are not the same up to rounding."""
    assert one.gradients.keys() == other.gradients.keys() and len(one.values) == len(other.values)
    pairs = {f"value {place}": pair for place, pair in enumerate(zip(one.values, other.values))}
    pairs |= {name: (gradient, other.gradients[name]) for name, gradient in one.gradients.items()}
    return [name for name, pair in pairs.items() if not torch.allclose(*pair, rtol=1e-4, atol=1e-5)]


def a_vision_tower(checkpoint_every: int) -> VisionTower:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2}
    tower = VisionTower(VisionConfig("vit_tiny_patch16_224", checkpoint_every=checkpoint_every, **sizes))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower


def a_text_tower(checkpoint_every: int) -> TextTower:
    torch.manual_seed(0)
    config = TextConfig(32, 3, 2, context_length=40, vocab_size=64, eos_token_id=63, checkpoint_every=checkpoint_every)
    tower = TextTower(config)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower


TOKENS, TEXTS = torch.ones(2, 17, 32).cumsum(1) / 17, torch.tensor([[1, 5, 63, 0], [1, 9, 7, 63]])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("build", "part", "given"),
    [
        (a_vision_tower, "through_blocks", (TOKENS, False, False)),
        (a_vision_tower, "through_blocks", (TOKENS, True, True)),
        (a_text_tower, "pooled", (TEXTS,)),
    ],
    ids=["vision", "vision-scores-and-class-token", "text"],
)
def test_a_compiled_tower_that_recomputes_blocks_is_the_plain_tower(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[int], nn.Module], part: str, given: tuple[Any, ...], every: int
) -> None:
    """And it does recompute them: it keeps less for the backward."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    plain, tower = build(0), build(every)
    compiled = Compiled(getattr(tower, part), part)
    expected, found = passed(plain, getattr(plain, part), *given), passed(tower, compiled, *given)
    assert compiled.failed is None
    assert not differences(expected, found)
    assert found.kept < 0.75 * expected.kept


def test_texts_of_one_length_are_one_graph_however_wide_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken in groups by length, and all together."""
    graphs = Graphs()
    monkeypatch.setattr(compiling, "BACKEND", graphs)
    tower = a_text_tower(0)
    tower.fixed_shapes = True
    tower.pooled = Compiled(tower.pooled, "the texts")  # type: ignore[method-assign,assignment]
    made = []
    for lengths in ([3, 3, 3, 3, 9, 9, 20, 20], [3] * 8):
        for width in (24, 32, 40):
            ids = torch.zeros(8, width, dtype=torch.long)
            ids[torch.arange(8), torch.tensor(lengths) - 1] = 63
            tower(ids, lengths)
            made.append(len(graphs.made))
    assert made == [3, 3, 3, 4, 4, 4]


def test_a_tower_that_is_not_quite_right_is_seen() -> None:
    plain, tower = a_vision_tower(0), a_vision_tower(1)

    def mixed(*given: Any) -> Tensor:
        tokens, _ = tower.through_blocks(*given)
        return tokens + 1e-3 * tokens.roll(1, dims=-1)

    expected, found = (
        passed(model, part, TOKENS, False, False) for model, part in ((plain, plain.through_blocks), (tower, mixed))
    )
    assert "value 0" in differences(expected, found) and "blocks.0.attn.qkv.weight" in differences(expected, found)
