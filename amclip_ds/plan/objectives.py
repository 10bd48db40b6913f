"""The objectives as a plan sees them: their parameters, what they read, and what they cost.

Those that ship are known without torch; any other one (a plug-in's, a new one) is built on torch's meta device and its
forward is traced there. tests/unit/plan holds what is known against what is traced.
Shapes: V views, B samples of a rank, C samples of all ranks, D vision width, E embedding, P output of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from amclip_ds.masks.units import NONE
from amclip_ds.model.config import HeadsConfig, LossConfig
from amclip_ds.plan import shapes
from amclip_ds.plan.shapes import Parameters

FP32 = 4
KNOWN_KEYS = {
    "kind",
    "contrastive_weight",
    "o2o_weight",
    "o2e_weight",
    "o2o_temperature",
    "chunk",
    "exchange",
    "text",
    "release",
}


@dataclass(frozen=True)
class Sizes:
    """What the cost of an objective depends on."""

    views: int
    local: int
    """samples of a rank"""
    world: int
    micro: int
    """samples whose activations are held at a time"""
    width: int
    text_width: int
    embed_dim: int
    bytes: int
    """of a number in the dtype of the forward"""
    kept: tuple[int, ...]
    """patch tokens of each view"""
    text_tokens: int
    teacher_patches: int
    teacher_looks: int = 0
    """views that the teacher sees; 0: one crop"""


@dataclass(frozen=True)
class Cost:
    """Floating point operations of a rank's batch, forward and backward; bytes that wait for the backward pass."""

    flops: float
    saved: float
    transient: float = 0.0
    """bytes on top of the saved ones, for a moment"""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.saved + other.saved, max(self.transient, other.transient))


FREE = Cost(0.0, 0.0)


@dataclass(frozen=True)
class Part:
    """An objective of a run."""

    parameters: Parameters = field(default_factory=dict)
    averaged: tuple[str, ...] = ()
    targets: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    text: str | None = None
    """the form of the texts that it reads (objectives.base.TEXT_PASSES)"""
    cost: Callable[[Sizes], Cost] = lambda sizes: FREE
    """of the whole local batch"""
    start: float = 0.0
    """share of the run after which it begins"""
    observed: Callable[[Sizes], float] = lambda sizes: 0.0
    """floating point operations of making its targets"""


def parts_of(config: Any, width: int, grid: int, patch: int) -> dict[str, Part]:
    """The objectives that a configuration builds, in the order in which they are summed.

    width, grid, patch: of the vision tower.
    """
    return _known(config, width) if _is_known(config) else _built(config, width, grid, patch)


def _is_known(config: Any) -> bool:
    """Whether everything that has a weight is described here."""
    if config.plugins:
        return False
    default = LossConfig()
    for item in fields(config.loss):
        value = getattr(config.loss, item.name)
        is_off = getattr(value, "weight", None) == 0 if is_dataclass(value) else value == getattr(default, item.name)
        if item.name not in KNOWN_KEYS and not is_off:
            return False
    return True


def _known(config: Any, width: int) -> dict[str, Part]:
    loss, heads = config.loss, config.heads
    text = loss.text if config.data.text_mask.strategy != NONE else "plain"
    found: dict[str, Part] = {}
    if loss.contrastive_weight > 0:
        embeds = frozenset({"image_embeds", "text_embeds"})
        if loss.kind == "sigmoid":
            found["sigmoid"] = Part(
                features=embeds | {"logit_bias"},
                text=text,
                cost=lambda sizes: (ring_cost if loss.exchange == "ring" else sigmoid_cost)(sizes, loss.chunk),
            )
        else:
            found["contrastive"] = Part(
                features=embeds,
                text=text,
                cost=lambda sizes: (ring_cost if loss.exchange == "ring" else contrastive_cost)(sizes, loss.chunk),
            )
    if loss.o2o_weight > 0:
        head = shapes.simclr_head(width, heads)
        on_ring = loss.exchange == "ring"
        found["simclr"] = Part(
            {f"head.{name}": value for name, value in shapes.head_parameters(head, True).items()},
            features=frozenset({"cls"}),
            cost=lambda sizes: (
                head_cost(head, sizes.views * sizes.local, sizes.bytes, heads)
                + (pairs_ring_cost if on_ring else pairs_cost)(sizes, heads.output_dim, loss.chunk)
            ),
        )
    if loss.o2e_weight > 0:
        parts = shapes.byol_heads(width, heads)
        parameters: Parameters = {}
        for part, widths in parts.items():
            named = shapes.head_parameters(widths, False)
            parameters |= {f"{part}.{name}": value for name, value in named.items()}
        found["byol"] = Part(
            parameters,
            averaged=("projector",),
            targets=frozenset({"cls"}),
            features=frozenset({"cls"}),
            cost=lambda sizes: (
                head_cost(parts["projector"], sizes.views * sizes.local, sizes.bytes, heads)
                + head_cost(parts["predictor"], sizes.views * sizes.local, sizes.bytes, heads)
            ),
            observed=lambda sizes: 2.0 * sizes.local * _products(parts["projector"]),
        )
    return found


def _products(widths: list[int]) -> int:
    return sum(before * after for before, after in zip(widths, widths[1:]))


def head_cost(widths: list[int], rows: int, width: int, heads: HeadsConfig) -> Cost:
    """Of a head over so many rows. Batch norm keeps its input in fp64, and its results before scale and shift in fp32.

    width: bytes of a number in the dtype of the forward.
    """
    of_norm = 8 + 2 * FP32 if heads.norm == "batch" else width
    saved = rows * (width * widths[0] + sum((of_norm + width) * hidden for hidden in widths[1:-1]))
    return Cost(6.0 * rows * _products(widths), float(saved))


def contrastive_cost(sizes: Sizes, chunk: int) -> Cost:
    """Two directions a view, each with [B, C] logits in fp32, before and after the softmax; or a chunk at a time."""
    directions = 2 * sizes.views
    columns = sizes.local * sizes.world
    return _logits(directions, sizes.local, columns, sizes.embed_dim, 2, chunk) + _gathered(
        (sizes.views + 1) * columns * sizes.embed_dim
    )


def pairs_cost(sizes: Sizes, output_dim: int, chunk: int) -> Cost:
    """Two directions, each against both views of all ranks."""
    columns = 2 * sizes.local * sizes.world
    return _logits(2, sizes.local, columns, output_dim, 1, chunk) + _gathered(3 * columns * output_dim)


def sigmoid_cost(sizes: Sizes, chunk: int) -> Cost:
    """The logits against one rank's texts at a time, formed again in the backward pass."""
    rows = min(chunk or sizes.local, sizes.local)
    flops = 8.0 * sizes.views * sizes.local * sizes.local * sizes.world * sizes.embed_dim
    texts = sizes.world * sizes.local * sizes.embed_dim * FP32
    return Cost(flops, float(texts), 4.0 * FP32 * rows * sizes.local)


def ring_cost(sizes: Sizes, chunk: int) -> Cost:
    """A tile of [B, B] logits, or a chunk of its rows, at a time: once forward, once again and for two gradients
    backward. Texts and their gradients travel: those here, those that come."""
    rows = min(chunk or sizes.local, sizes.local)
    flops = 8.0 * sizes.views * sizes.local * sizes.local * sizes.world * sizes.embed_dim
    texts = float(FP32 * sizes.local * sizes.embed_dim)
    return Cost(flops, (sizes.views + 1) * texts, 4.0 * FP32 * rows * sizes.local + 4 * texts)


def pairs_ring_cost(sizes: Sizes, output_dim: int, chunk: int) -> Cost:
    """The same of both views of a rank against both of another."""
    both = 2 * sizes.local
    flops = 8.0 * both * both * sizes.world * output_dim
    features = float(FP32 * both * output_dim)
    return Cost(flops, 2 * features, 4.0 * FP32 * min(chunk or both, both) * both + 4 * features)


def _logits(directions: int, rows: int, columns: int, width: int, copies: int, chunk: int) -> Cost:
    """copies: [rows, columns] tensors that each direction keeps for its backward pass."""
    of_one = float(FP32 * rows * columns)
    if chunk and chunk < rows:
        return Cost(8.0 * directions * rows * columns * width, 0.0, 4.0 * FP32 * chunk * columns)
    return Cost(6.0 * directions * rows * columns * width, directions * copies * of_one, 2 * of_one)


def _gathered(elements: int) -> Cost:
    """What came from all ranks, in fp32."""
    return Cost(0.0, float(FP32 * elements))


def _built(config: Any, width: int, grid: int, patch: int) -> dict[str, Part]:
    from amclip_ds.plan import traced

    return traced.parts_of(config, width, grid, patch)
