"""What an optimizer asks for beside its state: Muon's operations and messages; learning rates for a batch."""

from typing import Any

from amclip_ds.config import TrainConfig
from amclip_ds.optim import REFERENCE_BATCH, REFERENCE_LR, endless_warmup, is_hidden_matrix, scaled_lr, shape_of
from amclip_ds.plan.work import Work

ITERATIONS = 5  # of Newton-Schulz, as DeepSpeed has them
RULE = {"adamw": "square root", "muon": "square root", "lion": "square root", "sgd": "proportion"}


def muon_shapes(step: Work) -> list[tuple[int, ...]]:
    """The matrices that Muon steps; none with another optimizer."""
    if step.config.optim.name != "muon":
        return []
    trained = ((name, shape_of(p)) for name, p in step.student.items() if p.requires_grad)
    return [shape for name, shape in trained if is_hidden_matrix(name, shape)]


def muon_elements(step: Work) -> int:
    """Of those matrices."""
    return sum(rows * columns for rows, columns in muon_shapes(step))


def muon_flops(step: Work) -> float:
    """Operations of a step's Newton-Schulz over all matrices, once each; at most (on oblong matrices DeepSpeed iterates
    on the smaller square). Ranks share them, a matrix at the edge of two shares costs both."""
    total = 0.0
    for rows, columns in muon_shapes(step):
        n, m = min(rows, columns), max(rows, columns)
        total += ITERATIONS * (4.0 * n * n * m + 2.0 * n**3)
    return total


def learning_rates(config: TrainConfig) -> dict[str, Any]:
    """The configured peak beside what the usual rules make of CLIP's own, for a program."""
    batch, name = config.batch.global_size, config.optim.name
    return {
        "configured": config.optim.lr,
        "batch": batch,
        "reference": {"lr": REFERENCE_LR, "batch": REFERENCE_BATCH, "optimizer": "adamw"},
        "rule": RULE[name],
        "square_root": scaled_lr(batch),
        "proportion": REFERENCE_LR * batch / REFERENCE_BATCH,
    }


def learning_rate_lines(config: TrainConfig, steps: int) -> list[str]:
    """The same for people. steps: the run's length."""
    rates, name = learning_rates(config), config.optim.name
    lines = [
        f"learning rate: optim.lr={rates['configured']:g} at {rates['batch']:,} samples a step; {REFERENCE_LR:g} at"
        f" {REFERENCE_BATCH:,} (CLIP and A-CLIP, adamw) is {rates['square_root']:.2g} here by the square root of the"
        f" batch, {rates['proportion']:.2g} in proportion"
    ]
    lines.append(
        {
            "adamw": "  adamw: the square root; its step does not grow with the gradient",
            "muon": "  muon: the square root, and adamw's rate: its updates are made as large as adamw's",
            "lion": "  lion: the square root of a third to a tenth of it, with as much more weight decay",
            "sgd": "  sgd: in proportion, but no CLIP was trained so: no rate is known",
        }[name]
    )
    if endless := endless_warmup(config.optim, steps):
        lines.append(f"  {'; '.join(endless)} is a twentieth of the run")
    return lines


def muon_note(step: Work) -> str | None:
    """What Muon costs beside the model's own work."""
    shapes = muon_shapes(step)
    if not shapes:
        return None
    return (
        f"muon: Newton-Schulz over {len(shapes)} matrices, at most {muon_flops(step) / 1e12:.3g} TFLOP a step over all"
        f" ranks, beside the model's; not measured on a GPU"
    )
