"""Initial weights: each parameter from its own generator, keyed by (seed, name), so that every rank, stage and machine
starts alike, and one shard can be made without the rest.

Sources: timm's ViT and CLIP's text initialisation as the published code uses them; torch's defaults for the heads.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from amclip_ds.errors import UserError
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.names import first_name
from amclip_ds.model.pretrained import loaded_tensor

SINCOS_SCALE = 0.3
LAYER_SCALE = 1e-5
LOGIT_SCALE = math.log(1 / 0.07)
LOGIT_BIAS = -10.0

Shape = Sequence[int]
Rule = Callable[[np.random.Generator, Shape, ModelConfig], Tensor]
"""(the parameter's own generator, its shape, model) -> its first value, fp32"""


@dataclass(frozen=True)
class Start:
    """What decides the first weights."""

    seed: int
    model: ModelConfig
    logit_scale: float = LOGIT_SCALE
    rules: tuple[tuple[str, Rule], ...] = ()
    """the objectives' own: pattern of the whole name -> rule; they come before RULES"""


def init_tensor(name: str, shape: Shape, start: Start) -> Tensor:
    """The first value of one parameter or buffer of AClip or TeacherModel, whole, fp32 (counters int64), on the CPU.

    model.init_from's where that source holds it. Raises UserError for a name without a rule, and for a source that does
    not fit.
    """
    model = start.model
    loaded = loaded_tensor(model.init_from, name, shape) if model.init_from else None
    if loaded is not None:
        return loaded
    if name == "logit_scale":
        return torch.full(tuple(shape), start.logit_scale)
    if name == "logit_bias":
        return torch.full(tuple(shape), LOGIT_BIAS)
    for pattern, rule in (*start.rules, *RULES):
        if re.fullmatch(pattern, name):
            value = rule(generator(start.seed, first_name(name)), shape, model)
            if tuple(value.shape) != tuple(shape):
                raise UserError(f"{name}: its rule gave a first value of {list(value.shape)}; it has {list(shape)}")
            return value
    raise UserError(f"no rule to initialise {name}; an objective's `init` gives one")


def generator(seed: int, name: str) -> np.random.Generator:
    """Philox keyed by (seed, name): the same numbers on every machine, whatever was drawn before."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


@torch.no_grad()
def initialise(module: nn.Module, start: Start) -> None:
    """Initialises every parameter and persistent buffer of an AClip or TeacherModel in place."""
    tensors = {**dict(module.named_parameters()), **persistent_buffers(module)}
    for name, value in init_tensors({name: tensor.shape for name, tensor in tensors.items()}, start):
        tensors[name].copy_(value)


def init_tensors(shapes: Mapping[str, Shape], start: Start) -> Iterator[tuple[str, Tensor]]:
    """init_tensor of many names, drawn by as many threads as torch has, so many at a time in memory: each has a
    generator of its own, so that the threads change no number."""
    threads = 1 if start.model.init_from else torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(shapes)
        while names := list(itertools.islice(remaining, threads)):
            yield from zip(names, pool.map(lambda name: init_tensor(name, shapes[name], start), names))


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state (batch norm's), by name."""
    state = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def constant(value: float) -> Rule:
    return lambda draw, shape, model: torch.full(tuple(shape), value)


def _counter(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.long)


def normal(std: float | Callable[[ModelConfig], float]) -> Rule:
    """timm's truncated normal cuts at +-2, which is 100 deviations of 0.02: a plain normal."""

    def rule(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
        values = draw.standard_normal(size=tuple(shape), dtype=np.float32)
        return torch.from_numpy(values).mul_(std(model) if callable(std) else std)

    return rule


def _normal_by_fan_in(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
    """The projections of CLIP: width of the tower ** -0.5."""
    return torch.from_numpy(draw.standard_normal(size=tuple(shape), dtype=np.float32)).mul_(shape[1] ** -0.5)


def uniform_by_fan_in(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
    """torch's default for the weights of linear and convolution layers: +- fan_in ** -0.5."""
    bound = math.prod(shape[1:]) ** -0.5
    return torch.from_numpy(draw.random(size=tuple(shape), dtype=np.float32)).mul_(2 * bound).sub_(bound)


def xavier(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
    """Of a matrix: +- (6 / (inputs + outputs)) ** 0.5."""
    bound = (6 / sum(shape)) ** 0.5
    return torch.from_numpy(draw.random(size=tuple(shape), dtype=np.float32)).mul_(2 * bound).sub_(bound)


def _head_weight(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
    """A linear's weight is a matrix, a norm's a vector."""
    return torch.ones(tuple(shape)) if len(shape) == 1 else uniform_by_fan_in(draw, shape, model)


def _positions(draw: np.random.Generator, shape: Shape, model: ModelConfig) -> Tensor:
    """[1, (1 +) N, D]: normal, or 0.3 x the 2-D sine-cosine table with a CLS row of zeros."""
    if model.vision.position_init == "normal":
        return normal(0.02)(draw, shape, model)
    from timm.layers import build_sincos2d_pos_embed

    _, length, width = shape
    grid = math.isqrt(length)
    table = build_sincos2d_pos_embed([grid, grid], dim=width) * SINCOS_SCALE
    return torch.cat([torch.zeros(length - grid * grid, width), table])[None]


def _text_std(power: Callable[[int, int], float]) -> Callable[[ModelConfig], float]:
    return lambda model: power(model.text.width, model.text.depth)


_TEXT_ATTENTION = normal(_text_std(lambda width, depth: width**-0.5))
_TEXT_OUTPUT = normal(_text_std(lambda width, depth: width**-0.5 * (2 * depth) ** -0.5))
_TEXT_HIDDEN = normal(_text_std(lambda width, depth: (2 * width) ** -0.5))
_ZEROS = constant(0.0)
_ONES = constant(1.0)


RULES: list[tuple[str, Rule]] = [
    (r"vision\.cls_token", normal(0.02)),
    (r"vision\.pos_embed", _positions),
    (r"vision\.patch_embed\.proj\.weight", uniform_by_fan_in),
    (
        r"vision\.patch_embed\.proj\.bias",
        normal(0.02),
    ),  # the spread of torch's +- (3 * 16 * 16) ** -0.5; it stays frozen
    (r"vision\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", normal(0.02)),
    (r"vision\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.bias", _ZEROS),
    (r"vision\.blocks\.\d+\.ls[12]\.gamma", constant(LAYER_SCALE)),
    (r"text\.embeddings\.token_embedding\.weight", normal(0.02)),
    (r"text\.embeddings\.position_embedding\.weight", normal(0.01)),
    (r"text\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj\.weight", _TEXT_ATTENTION),
    (r"text\.encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)\.weight", _TEXT_OUTPUT),
    (r"text\.encoder\.layers\.\d+\.mlp\.fc1\.weight", _TEXT_HIDDEN),
    (r"text\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc[12])\.bias", _ZEROS),
    (r"(image|text)_projection\.weight", _normal_by_fan_in),
    (r"objectives\..+\.weight", _head_weight),
    (r"objectives\..+\.running_mean", _ZEROS),
    (r"objectives\..+\.running_var", _ONES),
    (r"objectives\..+\.num_batches_tracked", _counter),
    (r"objectives\..+\.bias", _ZEROS),
    (r".*norm[^.]*\.weight", _ONES),
    (r".*norm[^.]*\.bias", _ZEROS),
]
