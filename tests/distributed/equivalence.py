"""The equivalence table: the same samples through every stage, precision, world and accumulation, against one rank.

`python -m benchmarks.equivalence` runs and prints it whole; tests/distributed/test_equivalence.py asserts its cells.
fp32 cells are held against one rank at stage 0 that runs its batch whole, bf16 ones against one rank at stage 1.
"""

import math
import re
import statistics
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.harness import run_ranks

STEPS = 20
SEED = 0
BATCH = 32  # over fewer samples the heads' batch norm amplifies rounding
SGD = {"name": "sgd", "lr": 0.01}
ADAMW = {"name": "adamw", "lr": 2e-4, "weight_decay": 0.05}
MUON = {"name": "muon", "lr": 2e-3, "momentum": 0.95, "weight_decay": 0.05}
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW, "muon": MUON}
# Their gradient is zero in exact arithmetic, so what they hold is rounding alone: a bias before a batch norm, and the
# keys' bias, which moves every logit of a row alike (the image tower's is part of qkv.bias, held like the others).
WITHOUT_GRADIENT = r"objectives\.simclr\.head\.layers\.[03]\.bias|text\.encoder\.layers\.\d+\.self_attn\.k_proj\.bias"
FP32_LOSS, FP32_TENSOR, FP32_STATISTICS, ADAMW_LOSS, SCORE_GAP = 1e-5, 1e-5, 1e-4, 1e-4, 1e-7
FP32_BIAS = 3e-5  # they begin at zero and are sums of a few gradients, whose rounding no initial value makes small
STATISTICS, BIASES = r".*running_.*", r".*bias"


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    ds: str
    world_size: int
    accumulation: int
    strategy: str = "random"
    optimizer: str = "sgd"
    replays: bool = True
    """Attentive masks: train with the reference's keep_indices."""
    steps: int = STEPS

    @property
    def is_bf16(self) -> bool:
        return "bf16" in self.ds

    @property
    def name(self) -> str:
        masks = self.strategy + (" replayed" if self.strategy == "attentive" and self.replays else "")
        return f"{self.ds.removesuffix('.json')} ranks {self.world_size} x {self.accumulation} {masks} {self.optimizer}"

    def reference(self) -> "Cell":
        """What the cell must agree with."""
        ds = "zero1_bf16.json" if self.is_bf16 else "zero0_fp32.json"
        return Cell(ds, 1, 1, self.strategy, self.optimizer, steps=self.steps)


@dataclass(frozen=True)
class Verdict:
    """How far a cell is from its reference."""

    loss: float
    """largest relative difference of a step's loss"""
    student: float
    """largest difference of a weight over its tensor's largest"""
    teacher: float
    """the same, of the average"""
    biases: float
    """the same, of the biases of both, which the two before leave out"""
    statistics: float
    """the same, of both batch norms' running statistics"""
    worst: str
    """the student's tensor that is furthest"""
    flips: int
    """blocks that the cell's own scores would have chosen otherwise, of all steps before the runs part"""
    gap: float
    """the largest difference of the scores of two blocks that changed places"""


_results: dict[tuple[Cell, int], dict[str, Any]] = {}


def run(cells: list[Cell], seed: int = SEED) -> list[dict[str, Any]]:
    """What each cell's run gave. Cells of one ds_configs file and world share a launch; results are kept."""
    launches: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if (cell, seed) not in _results:
            launches.setdefault((cell.ds, cell.world_size), []).append(cell)
    for (ds, world_size), together in launches.items():
        replays = [_replay(cell, seed) for cell in together]
        variants = [
            {
                "steps": cell.steps,
                "accumulation": cell.accumulation,
                "optim": OPTIMIZERS[cell.optimizer],
                "seed": seed,
                "strategy": cell.strategy,
                "recipe": True,
                "smooth": True,
                "batch_size": BATCH,
                "replay": replay,
            }
            for cell, replay in zip(together, replays)
        ]
        results = run_ranks(
            "tests.distributed.cases:train_all", world_size=world_size, timeout_s=1800, ds=ds, variants=variants
        )[0]
        _results.update({(cell, seed): result for cell, result in zip(together, results, strict=True)})
    return [_results[cell, seed] for cell in cells]


def _replay(cell: Cell, seed: int) -> list[Tensor] | None:
    is_replay = cell.strategy == "attentive" and cell.replays and cell != cell.reference()
    return run([cell.reference()], seed)[0]["keep"] if is_replay else None


def verdicts(cells: list[Cell]) -> list[Verdict]:
    """Runs the cells and holds each against its reference."""
    expected = run([cell.reference() for cell in cells])
    return [hold(cell, *pair) for cell, *pair in zip(cells, expected, run(cells))]


def hold(cell: Cell, expected: dict[str, Any], actual: dict[str, Any]) -> Verdict:
    both = ("student", "teacher")
    (student, worst), (teacher, _) = (furthest(expected[who], actual[who]) for who in both)
    biases, running = (max(furthest(expected[w], actual[w], kind)[0] for w in both) for kind in (BIASES, STATISTICS))
    flips, gap = flipped(expected["keep"], actual["keep"], actual["scores"], cell.replays)
    loss = loss_difference(expected["losses"], actual["losses"])
    return Verdict(loss, student, teacher, biases, running, worst, flips, gap)


def loss_difference(expected: list[float], actual: list[float]) -> float:
    return max(abs(a - e) / abs(e) for e, a in zip(expected, actual, strict=True))


def distance(expected: Tensor, actual: Tensor) -> float:
    """The largest |difference| over the largest |element|; infinite where one is not a number."""
    share = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    return share if share == share else math.inf


def furthest(expected: dict[str, Tensor], actual: dict[str, Tensor], kind: str = "") -> tuple[float, str]:
    """The largest |difference| over the tensor's largest |element|, and whose it is.

    kind: of STATISTICS or BIASES; empty: of what is neither.
    """
    assert expected.keys() == actual.keys()
    distances = {
        name: distance(tensor, actual[name])
        for name, tensor in expected.items()
        if kind == next((one for one in (STATISTICS, BIASES) if re.fullmatch(one, name)), "")
        and tensor.is_floating_point()
        and not re.fullmatch(WITHOUT_GRADIENT, name)
    }
    worst = max(distances, key=lambda name: distances[name])
    return distances[worst], worst


def flipped(expected: list[Tensor], actual: list[Tensor], scores: list[Tensor], replays: bool) -> tuple[int, float]:
    """Blocks [V, B] rows of which were chosen otherwise than in the reference, and their largest score gap.

    Without a replay the runs part at the first step with a flip, and no later step is comparable.
    """
    flips, gap = 0, 0.0
    for theirs, ours, step_scores in zip(expected, actual, scores, strict=True):
        found, step_gap = _flipped_in_step(theirs, ours, step_scores)
        flips, gap = flips + found, max(gap, step_gap)
        if found and not replays:
            break
    return flips, gap


def _flipped_in_step(theirs: Tensor, ours: Tensor, scores: Tensor) -> tuple[int, float]:
    units = scores.shape[-1]
    side = int(units**0.5)
    grid = side * 2  # blocks of 2 x 2 tokens
    rows = (theirs != ours).any(-1).nonzero().tolist()
    flips, gap = 0, 0.0
    for view, sample in rows:
        blocks = [
            {(t // grid // 2) * side + t % grid // 2 for t in keep[view, sample].tolist()} for keep in (theirs, ours)
        ]
        values = scores[view, sample]
        left, entered = blocks[0] - blocks[1], blocks[1] - blocks[0]
        flips += len(left)
        gap = max([gap, *(abs(float(values[a] - values[b])) for a in left for b in entered)])
    return flips, gap


def seeds_spread(steps: int = STEPS) -> float:
    """How far two seeds' losses are apart in bf16: the mean over steps of the relative difference."""
    cell = Cell("zero1_bf16.json", 1, 1, steps=steps)
    first, second = run([cell])[0]["losses"], run([cell], seed=SEED + 1)[0]["losses"]
    return statistics.mean(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def moved(steps: int = STEPS) -> float:
    """How far the fp32 reference moved: the median over its matrices of |change| / |start|."""
    from amclip_ds.model.init import Start, init_tensor
    from tests.distributed.cases import recipe_model

    model, _ = recipe_model()
    student = run([Cell("zero0_fp32.json", 1, 1, steps=steps)])[0]["student"]
    weights = {n: w for n, w in student.items() if w.dim() >= 2 and "patch" not in n}
    starts = {name: init_tensor(name, weight.shape, Start(0, model)) for name, weight in weights.items()}
    return statistics.median(float((weights[n] - s).norm() / s.norm().clamp(min=1e-12)) for n, s in starts.items())


def table() -> list[Cell]:
    """Every cell, those of one launch together."""
    found = []
    for ds in [f"zero{stage}_{precision}.json" for precision in ("fp32", "bf16") for stage in range(4)]:
        for world_size in (1, 2, 4) if ds != "zero0_bf16.json" else ():
            for accumulation in (1, 2):
                split = (ds, world_size, accumulation)
                found.append(Cell(*split))
                if "fp32" in ds:
                    found.append(Cell(*split, strategy="attentive"))
                    found.append(Cell(*split, strategy="attentive", replays=False))
                    found.append(Cell(*split, optimizer="adamw"))
                    found.append(Cell(*split, optimizer="muon"))
    references = {cell.reference() for cell in found}
    return [cell for cell in found if cell not in references]


def complaints(cell: Cell, found: Verdict) -> list[str]:
    """What of a cell is outside its tolerance."""
    if cell.is_bf16:
        limits = [("loss", found.loss, seeds_spread(cell.steps))]
    elif cell.optimizer != "sgd":
        limits = [("loss", found.loss, ADAMW_LOSS)]
    elif not cell.replays and found.flips:
        limits = [("gap", found.gap, SCORE_GAP)]
    else:
        limits = [
            ("loss", found.loss, FP32_LOSS),
            ("student", found.student, FP32_TENSOR),
            ("teacher", found.teacher, FP32_TENSOR),
            ("biases", found.biases, FP32_BIAS),
            ("statistics", found.statistics, FP32_STATISTICS),
            ("gap", found.gap, SCORE_GAP),
        ]
    return [f"{name} {value:.2e} is over {limit:.2e}" for name, value, limit in limits if not value <= limit]
