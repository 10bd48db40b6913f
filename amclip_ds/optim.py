"""Optimizer, parameter groups (weight decay, learning-rate scales) and schedules as functions of the update."""

from dataclasses import dataclass, field


@dataclass
class OptimConfig:
    name: str = "adamw"
    """adamw | sgd | lion | lamb | adafactor | muon. The last three look at whole tensors: only at ZeRO stage 0."""
    lr: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.5
    """Decoupled weight decay; not applied to biases, norms and other one-dimensional parameters."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    momentum: float = 0.9
    """Momentum of sgd and muon; the others do not read it."""
    warmup_steps: int = 2000
    """Updates over which the learning rate grows linearly from warmup_start_lr to lr."""
    warmup_start_lr: float = 1e-6
    """Learning rate of the first update."""
    final_lr: float = 1e-5
    """Where the cosine ends."""
    clip_grad_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""
    layer_decay: float = 1.0
    """Each tower block's learning rate is this times that of the block after it; 1: all alike."""
    vision_lr_scale: float = 1.0
    """Factor on the learning rate of the vision tower."""
    text_lr_scale: float = 1.0
    """Factor on the learning rate of the text tower."""

    def __post_init__(self) -> None:
        names = ("adamw", "sgd", "lion", "lamb", "adafactor", "muon")
        if self.name not in names:
            raise ValueError(f"optim.name: {self.name!r} is none of {', '.join(names)}")
        if len(self.betas) != 2 or not all(0.0 <= b < 1.0 for b in self.betas):
            raise ValueError(f"optim.betas: {list(self.betas)} must be two numbers in [0, 1)")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"optim.layer_decay: {self.layer_decay} is outside (0, 1]")
        for key in ("lr", "weight_decay", "eps", "momentum", "warmup_steps", "warmup_start_lr", "final_lr",
                    "clip_grad_norm", "vision_lr_scale", "text_lr_scale"):
            if getattr(self, key) < 0:
                raise ValueError(f"optim.{key}: {getattr(self, key)} must be 0 or more")
