"""Optimizer, parameter groups (weight decay, learning-rate scales) and schedules as functions of the update."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

ALIGNED = 8  # bf16 numbers in 16 bytes
NAMES = ("adamw", "muon", "lion", "sgd")
REFERENCE_LR, REFERENCE_BATCH = 5e-4, 4096  # CLIP's and A-CLIP's for adamw
MUON_RMS = 0.2  # of an update's elements, about AdamW's: so both take the same learning rate and decay


@dataclass
class OptimConfig:
    name: str = "adamw"
    """adamw | muon | lion | sgd. muon: the matrices of the towers' blocks, all else by adamw. sgd: exactness tests."""
    lr: float = 5e-4
    """Peak learning rate. muon takes adamw's; lion wants a third to a tenth of it, and as much more weight_decay."""
    weight_decay: float = 0.5
    """Decoupled weight decay; not applied to biases, norms and other one-dimensional parameters."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    momentum: float = 0.9
    """Momentum of sgd and muon (0.95 there); the others do not read it."""
    warmup_steps: int = 2000
    """Updates over which the learning rate grows linearly from warmup_start_lr to lr."""
    warmup_start_lr: float = 1e-6
    """Learning rate of the first update."""
    final_lr: float = 1e-5
    """Where the cosine ends."""
    clip_grad_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping. muon's updates have a size of their own: 0 alone."""
    layer_decay: float = 1.0
    """Each tower block's learning rate is this times that of the block after it; 1: all alike."""
    vision_lr_scale: float = 1.0
    """Factor on the learning rate of the vision tower."""
    text_lr_scale: float = 1.0
    """Factor on the learning rate of the text tower."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"optim.name: {self.name!r} is none of {', '.join(NAMES)}")
        if len(self.betas) != 2 or not all(0.0 <= b < 1.0 for b in self.betas):
            raise ValueError(f"optim.betas: {list(self.betas)} must be two numbers in [0, 1)")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"optim.layer_decay: {self.layer_decay} is outside (0, 1]")
        for key in (
            "lr",
            "weight_decay",
            "eps",
            "momentum",
            "warmup_steps",
            "warmup_start_lr",
            "final_lr",
            "clip_grad_norm",
            "vision_lr_scale",
            "text_lr_scale",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"optim.{key}: {getattr(self, key)} must be 0 or more")
        if self.name == "muon" and self.clip_grad_norm:
            raise ValueError(
                "optim.clip_grad_norm: muon makes each update as large as its learning rate says, whatever the"
                " gradient's norm; set 0"
            )


def lr_at(updates: int, total_updates: int, config: OptimConfig) -> float:
    """Learning rate of the update that follows `updates` applied ones: linear warm-up, then a cosine."""
    if updates < config.warmup_steps:
        return config.warmup_start_lr + (config.lr - config.warmup_start_lr) * updates / config.warmup_steps
    progress = (updates - config.warmup_steps) / max(1, total_updates - config.warmup_steps)
    return cosine(config.lr, config.final_lr, progress)


def endless_warmup(config: OptimConfig, steps: int) -> tuple[str, str] | None:
    """(what is wrong, the setting for it) of a warm-up as long as a run of `steps`, else None: published ones are
    those of large data sets."""
    if not config.warmup_steps or config.warmup_steps < steps or config.warmup_steps == 1:
        return None
    said = f"warm-up takes {config.warmup_steps} steps and the run has {steps}: optim.lr is never reached"
    return said, f"optim.warmup_steps={max(1, steps // 20)}"


def scaled_lr(global_size: int) -> float:
    """What the reference's peak for adamw comes to at another batch, by the square root (arXiv 2205.10287)."""
    return REFERENCE_LR * math.sqrt(global_size / REFERENCE_BATCH)


class MomentumRange(Protocol):
    """The teacher's settings that the schedules read."""

    momentum: float
    final_momentum: float


@dataclass(frozen=True)
class Schedules:
    """What changes over a run of total_updates: pure functions of the applied updates, without state."""

    optim: OptimConfig
    teacher: MomentumRange
    total_updates: int

    def lr(self, updates: int) -> float:
        """Learning rate of the update that follows `updates` applied ones."""
        return lr_at(updates, self.total_updates, self.optim)

    def momentum(self, updates: int) -> float:
        """The teacher's momentum before the update that follows `updates` applied ones."""
        return momentum_at(updates, self.total_updates, self.teacher.momentum, self.teacher.final_momentum)

    def progress(self, updates: int) -> float:
        """How much of the run `updates` applied ones are, 0 to 1."""
        return min(1.0, updates / max(1, self.total_updates))


def momentum_at(updates: int, total_updates: int, momentum: float, final_momentum: float = 1.0) -> float:
    """A cosine over the whole run, without warm-up."""
    return cosine(momentum, final_momentum, updates / max(1, total_updates))


def cosine(start: float, end: float, progress: float) -> float:
    """From start (progress 0) to end (progress 1 and beyond) on half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def parameter_groups(
    named_parameters: "Iterable[tuple[str, nn.Parameter]]",
    config: OptimConfig,
    starts: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters by optimizer, weight decay, learning-rate scale and start, each group {params, names,
    use_muon, weight_decay, lr, lr_scale, start}. Whoever sets the learning rate gives a group lr * lr_scale, and 0
    before its start.

    starts: objective -> the share of the run after which it begins.

    No decay: fewer than two dimensions (biases, norms, the logit scale). Order: that of the first member's appearance,
    Muon's matrices by their shape, the largest first. What does not fill 16 bytes evenly (the logit scale) comes last
    of all: DeepSpeed lays a run's weights end to end in one buffer, and behind a single odd element every later weight
    would start at an address from which a GPU's matrix products take several times as long (docs/results/gpu-step.md).
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    depths = {tower: _depth(tower, (name for name, _ in named)) for tower in ("vision", "text")}
    groups: dict[tuple[float, float, float, bool], dict[str, Any]] = {}
    for name, parameter in sorted(named, key=lambda item: _is_odd(item[1])):
        shape = shape_of(parameter)
        use_muon = config.name == "muon" and is_hidden_matrix(name, shape)
        larger = muon_scale(shape) if use_muon else 1.0
        decay = config.weight_decay / larger if len(shape) >= 2 else 0.0  # the decay is not larger: it is times lr too
        scale = lr_scale(name, depths, config) * larger
        of_objective = name.split(".")[1] if name.startswith("objectives.") else ""
        start = (starts or {}).get(of_objective, 0.0)
        fresh = {
            "params": [],
            "names": [],
            "use_muon": use_muon,
            "weight_decay": decay,
            "lr": config.lr * scale,
            "lr_scale": scale,
            "start": start,
        }
        group = groups.setdefault((decay, scale, start, use_muon), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    for group in groups.values():
        if group["use_muon"]:  # as DeepSpeed's Muon sorts them: a matrix's place is known before that is built
            names, parameters = group["names"], group["params"]
            order = sorted(range(len(names)), key=lambda place: shape_of(parameters[place]), reverse=True)
            group |= {"names": [names[i] for i in order], "params": [parameters[i] for i in order]}
    return sorted(groups.values(), key=lambda group: _is_odd(group["params"][-1]))


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The true shape: under ZeRO-3 a parameter is an empty vector between its uses, and this is its ds_shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Muon takes a parameter: the matrices of the towers' blocks. Embeddings, projections and heads are
    adamw's, as its authors have it."""
    return len(shape) == 2 and _block(name) is not None


def muon_scale(shape: tuple[int, ...]) -> float:
    """Factor on the learning rate that gives an update of [rows, columns] elements of root mean square MUON_RMS
    (Moonlight, arXiv 2502.16982, section 2.2).

    An orthogonal update's is 1 / sqrt(max(rows, columns)), and DeepSpeed multiplies it by sqrt(max(1, rows / columns)).
    """
    return MUON_RMS * math.sqrt(shape[1])


def _is_odd(parameter: Any) -> bool:
    """Whether bf16 weights laid behind it lose their alignment."""
    return getattr(parameter, "ds_numel", parameter.numel()) % ALIGNED != 0


def lr_scale(name: str, depths: dict[str, int], config: OptimConfig) -> float:
    """Factor on a parameter's learning rate: its tower's scale, times layer_decay per layer between it and the top.

    Layer 0 is a tower's embeddings, then come its blocks; final norm, projections and heads are the top.
    """
    tower = name.split(".", 1)[0]
    if tower not in depths:
        return 1.0
    tower_scale = config.vision_lr_scale if tower == "vision" else config.text_lr_scale
    block = _block(name)
    if block is not None:
        layer = block + 1
    elif name.startswith(("vision.norm.", "text.final_layer_norm.")):
        layer = depths[tower] + 1
    else:
        layer = 0
    return tower_scale * config.layer_decay ** (depths[tower] + 1 - layer)


def _block(name: str) -> int | None:
    found = re.match(r"(?:vision\.blocks|text\.encoder\.layers)\.(\d+)\.", name)
    return int(found[1]) if found else None


def _depth(tower: str, names: Iterable[str]) -> int:
    blocks = [_block(name) for name in names if name.startswith(f"{tower}.")]
    return max((block + 1 for block in blocks if block is not None), default=0)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> "torch.optim.Optimizer":
    """The optimizer of config.name over the groups of parameter_groups: torch's own, timm's Lion. Muon, which is
    DeepSpeed's, is built by engine/muon.py."""
    import torch  # here: whoever only reads a config needs none of it

    betas = (config.betas[0], config.betas[1])
    lr, decay = config.lr, config.weight_decay
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True, lr=lr, weight_decay=decay)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, lr=lr, weight_decay=decay)
    assert config.name == "lion"
    from timm.optim import Lion  # here: timm costs seconds to import

    return Lion(groups, betas=betas, lr=lr, weight_decay=decay)
