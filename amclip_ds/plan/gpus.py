"""GPUs: their memory, peak and power as their makers state them, and the speeds of this trainer that were measured.

A speed is never carried to a GPU on which nothing was measured; --mfu or --probe gives one there.
"""

import difflib
import math
import re
from dataclasses import dataclass, fields
from functools import cache

from amclip_ds import config as settings
from amclip_ds.engine.ds_config import TOWER, is_offloaded, read_ds_config
from amclip_ds.errors import UserError
from amclip_ds.model.savings import Savings
from amclip_ds.plan import work as step_work


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_gib: float
    """what its driver reports"""
    peak_tflops: float | None
    """dense matrix products in bf16, as its maker states"""
    watts: float | None
    """its board at full power"""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 39.4, 312, 400),
        Gpu("a100-80", 79.2, 312, 400),
        Gpu("h100", 79.6, 989, 700),
        Gpu("h100-nvl", 93.6, 835, 400),
        Gpu("h200", 140.4, 989, 700),
        Gpu("gh200", 94.5, 989, 900),
        Gpu("b200", 178.4, 2250, 1000),
        Gpu("l4", 22.5, 121, 72),
        Gpu("l40s", 44.5, 362, 350),
        Gpu("a10", 22.5, 125, 150),
        Gpu("a40", 44.5, 150, 300),
        Gpu("rtx4090", 24.0, 165, 450),
        Gpu("mi250x", 64.0, 191.5, 280),  # one of the two halves of a card
        Gpu("mi300x", 192.0, 1307, 750),
    )
}


@dataclass(frozen=True)
class Measured:
    """A whole training step on one GPU with everything on the device, in bf16 (docs/results/gpu-step.md; compiled:
    gpu-compiled.md)."""

    gpu: str
    recipe: str
    stage: int
    batch: int
    is_recomputed: bool
    samples_per_s: float
    is_compiled: bool = False


MEASURED = (
    Measured("h100", "clip-vitb16", 1, 256, False, 2962, is_compiled=True),
    Measured("h100", "aclip-vitb16", 1, 256, False, 2306, is_compiled=True),
    Measured("h100", "aclip-eff-vitb16", 1, 256, False, 2551, is_compiled=True),
    Measured("h100", "aclip-vitl16", 1, 128, False, 790, is_compiled=True),
    Measured("h100", "aclip-vitb16", 3, 256, False, 1702, is_compiled=True),
    Measured("h100", "clip-vitb16", 1, 256, False, 1828),
    Measured("h100", "aclip-vitb16", 1, 256, False, 1265),
    Measured("h100", "aclip-eff-vitb16", 1, 256, False, 1329),
    Measured("h200", "aclip-vitb16", 1, 256, False, 1453),
    Measured("h200", "aclip-vitb16", 1, 256, True, 1310),
    Measured("h200", "aclip-vitb16", 2, 256, False, 1422),
    Measured("h200", "aclip-vitb16", 2, 256, True, 1142),
    Measured("h200", "aclip-vitb16", 3, 256, False, 496),
    Measured("h200", "aclip-vitb16", 3, 256, True, 493),
    Measured("h200", "aclip-vitl16", 1, 128, False, 586),
    Measured("h200", "aclip-vitl16", 1, 128, True, 475),
    Measured("h200", "aclip-vitl16", 2, 128, False, 513),
    Measured("h200", "aclip-vitl16", 2, 128, True, 441),
    Measured("h200", "aclip-vitl16", 3, 128, False, 143),
    Measured("h200", "aclip-vitl16", 3, 128, True, 169),
)
AS_MEASURED = [
    "engine.compile=none",
    "model.vision.freeze_patch_embed=true",
    *(f"engine.savings.{item.name}=false" for item in fields(Savings)),
]
"""The settings of the uncompiled ones: there were no savings yet, and every recipe's patches were frozen."""
SAME_CHIP = {"h100": "h200", "h200": "h100"}
REFERENCE = ("aclip-vitb16", 1, False)  # measured on both of the same chip: the ratio of their speeds
PROBED = "here"
SPELT = {"a100-80gb": "a100-80", "a100-40gb": "a100-40", "h100-80gb": "h100", "rtx-4090": "rtx4090"}


def gpu_of(name: str) -> Gpu:
    """Raises UserError for a name that is not known."""
    word = name.lower().replace("_", "-").removeprefix("nvidia-").removesuffix("-sxm")
    word = SPELT.get(word, word)
    if word in GPUS:
        return GPUS[word]
    alike = [known for known in GPUS if known.startswith(word + "-")]
    near = alike or difflib.get_close_matches(word, GPUS, n=1, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(GPUS)}"
    raise UserError(f"--gpu {name}: not known; {hint} (for another: one like it, --gpu-memory and --mfu)")


def kind_of(name: str, memory_gib: float) -> Gpu | None:
    """The kind of a GPU by what its driver calls it (`NVIDIA H100 NVL`), of kinds that differ in memory the nearest;
    None where none is known. Whole words: an L40S is no L4."""
    words = re.findall("[a-z0-9]+", name.lower())
    words += [first + second for first, second in zip(words, words[1:])]  # GeForce RTX 4090
    alike = [gpu for key, gpu in GPUS.items() if key.split("-")[0] in words]
    return min(alike, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)


@dataclass(frozen=True)
class Rate:
    """How fast a GPU executes this trainer's operations."""

    flops_per_s: float
    source: str
    launch_s: float = 0.0
    """of a block's pass: a step takes no less, however small its batch"""
    stage: int | None = None
    """where it holds for one ZeRO stage alone"""
    is_compiled: bool = True
    """whether it is that of compiled towers; of --mfu and --probe it is what was asked for"""

    def step_s(self, work: step_work.Work) -> float:
        """Seconds of a step, without communication."""
        executed = step_work.flops_of(work).executed / self.flops_per_s
        return max(executed, self.launch_s * step_work.block_passes(work))


def rate_of(gpu: Gpu, work: step_work.Work) -> Rate | None:
    """The speed on one GPU, from what was measured nearest to it, between two widths in their logarithm.

    None: nothing was measured on it.
    """
    ds = read_ds_config(work.config.engine)
    if work.bytes != 2 or is_offloaded(ds, "offload_optimizer") or is_offloaded(ds, "offload_param"):
        return None  # everything was measured in bf16, and on the device
    rows, factor = _nearest(gpu.name, work)
    if not rows:
        return None
    has_teacher = work.teacher_grid is not None
    alike = [row for row in rows if (_work_of(row).teacher_grid is not None) == has_teacher]
    points: dict[int, list[Measured]] = {}
    for row in alike or rows:
        points.setdefault(_work_of(row).tower.width, []).append(row)
    below = max((width for width in points if width <= work.tower.width), default=min(points))
    above = min((width for width in points if width >= work.tower.width), default=max(points))
    share = math.log(work.tower.width / below) / math.log(above / below) if above > below else 0.0
    share = min(max(share, 0.0), 1.0)
    rate = (1 - share) * _mean_rate(points[below]) + share * _mean_rate(points[above])
    names = sorted({row.recipe for width in {below, above} for row in points[width]})
    whose, is_compiled = points[below][0].gpu, points[below][0].is_compiled
    scaled = "" if factor == 1.0 else f", times {factor:.2f} (the two GPUs at {REFERENCE[0]})"
    how = "compiled" if is_compiled else "uncompiled"
    source = f"measured on one {whose} at stage {work.stage}, {how}: {', '.join(names)}{scaled}"
    return Rate(rate * factor, source, _launch_s(whose, work.stage, is_compiled) / factor, is_compiled=is_compiled)


def _nearest(gpu: str, work: step_work.Work) -> tuple[list[Measured], float]:
    """What was measured in this form, on this GPU or else on another of its chip, and how much faster this one is;
    compiled steps before uncompiled ones where whole towers are compiled."""
    other = SAME_CHIP.get(gpu, gpu)
    for is_compiled in (True, False) if work.compile_mode == TOWER else (False,):
        if rows := _rows(gpu, work, is_compiled):
            return rows, 1.0
        if rows := _rows(other, work, is_compiled):
            return rows, _reference(gpu) / _reference(other)
    return [], 1.0


def _launch_s(gpu: str, stage: int, is_compiled: bool) -> float:
    """The least that a block's pass took in what was measured: at ViT-B the host was the limit."""
    rows = [row for row in MEASURED if (row.gpu, row.stage, row.is_compiled) == (gpu, stage, is_compiled)]
    steps = [row.batch / row.samples_per_s / step_work.block_passes(_work_of(row)) for row in rows]
    return min(steps, default=0.0)


def _rows(gpu: str, work: step_work.Work, is_compiled: bool) -> list[Measured]:
    rows = [row for row in MEASURED if (row.gpu, row.stage, row.is_compiled) == (gpu, work.stage, is_compiled)]
    vision = work.config.model.vision
    return [row for row in rows if row.is_recomputed == bool(vision.checkpoint_every)]


def _reference(gpu: str) -> float:
    return next(
        row.samples_per_s
        for row in MEASURED
        if (row.gpu, row.recipe, row.stage, row.is_recomputed, row.is_compiled) == (gpu, *REFERENCE, False)
    )


def _mean_rate(rows: list[Measured]) -> float:
    rates = [step_work.flops_of(_work_of(row)).executed * row.samples_per_s / row.batch for row in rows]
    return sum(rates) / len(rates)


@cache
def _work_of(row: Measured) -> step_work.Work:
    every = int(row.is_recomputed)
    config = settings.load(
        row.recipe,
        [
            f"batch.global_size={row.batch}",
            f"batch.per_gpu={row.batch}",
            f"engine.deepspeed=zero{row.stage}_bf16.json",
            f"model.vision.checkpoint_every={every}",
            f"model.text.checkpoint_every={every}",
            *(["engine.compile=tower"] if row.is_compiled else AS_MEASURED),
        ],
    )
    return step_work.work_of(config, 1)
