"""Counts: accuracies, recalls, confusions, and how sure they are. CLIP_benchmark's names; fractions in [0, 1].

Ties: equal scores are ranked by place, the lowest number first, in classification and in retrieval alike. A collapsed
model, whose scores are all equal, is thus at chance.

Shapes: N images, C classes, Q queries, M candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclip_ds.errors import UserError
from amclip_ds.evaluate.set_names import GROUPED

MEAN_AVERAGE_PRECISION = "mean_average_precision"  # of several labels an image
RESAMPLES = 1000
NOT_FINITE = "the model's embeddings of this set are not finite: its weights have diverged or are damaged"


def classify(scores: Tensor, targets: Tensor) -> Tensor:
    """scores [N, C], targets [N] -> [N, 2] int64: the predicted class, and how many classes rank before the target.

    Raises UserError for scores that are not finite: a comparison with NaN would count as a miss in silence.
    """
    if not torch.isfinite(scores).all():
        raise UserError(NOT_FINITE)
    own = scores.gather(1, targets[:, None])
    places = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (places < targets[:, None]))
    first = (scores == scores.amax(1, keepdim=True)).int().argmax(1)  # argmax alone may return any of equals
    return torch.stack([first, before.sum(1)], dim=1)


def classification_metrics(
    predicted: np.ndarray,
    rank: np.ndarray,
    targets: np.ndarray,
    num_classes: int,
    second_class_lead: np.ndarray | None = None,
) -> dict[str, float]:
    """predicted, rank (classes before the target) and targets [N] -> acc1, acc5, mean_per_class_recall, roc_auc.

    acc5 is left out below 5 classes. mean_per_class_recall is over the classes that occur. roc_auc needs
    `second_class_lead` [N], its score less the first's, and both of two classes; equal leads count half. By the lead,
    as by the second class's probability, and unlike by its score alone, it is the same if the classes change places.
    """
    metrics = {"acc1": float((rank < 1).mean())}
    if num_classes >= 5:
        metrics["acc5"] = float((rank < 5).mean())
    hits, totals = per_class(predicted, targets, num_classes)
    metrics["mean_per_class_recall"] = float((hits[totals > 0] / totals[totals > 0]).mean())
    if second_class_lead is not None and len(np.unique(targets)) == 2:
        from sklearn.metrics import roc_auc_score

        metrics["roc_auc"] = float(roc_auc_score(targets, second_class_lead))
    return metrics


def metrics_of_set(
    name: str, predicted: np.ndarray, rank: np.ndarray, targets: np.ndarray, groups: np.ndarray | None
) -> dict[str, float]:
    """What is defined for one set alone. groups: [N, K] its metadata, or None."""
    if name == "iwildcam":
        from sklearn.metrics import f1_score

        score = f1_score(targets, predicted, average="macro", labels=np.unique(targets), zero_division=0)
        return {"F1-macro_all": float(score)}
    if name in GROUPED and groups is not None:
        metric, column, k = GROUPED[name]
        members = groups[:, column]
        return {metric: min(float((rank[members == group] < k).mean()) for group in np.unique(members))}
    return {}


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """scores [N, C], targets [N, C] of 0 and 1 -> the mean over classes of the mean precision at each image of a class.

    In fp32 and in CLIP_benchmark's order of sums; a class without images counts 0, as there. Raises UserError for
    scores that are not finite: NaN is sorted first, and would count.
    """
    if not torch.isfinite(scores).all():
        raise UserError(NOT_FINITE)
    found = scores.new_zeros(scores.shape[1])
    places = torch.arange(1, len(scores) + 1).float()
    for number in range(scores.shape[1]):
        order = scores[:, number].sort(0, descending=True).indices
        is_hit = targets[order, number].bool()
        precision = is_hit.float().cumsum(0) / places
        found[number] = precision[is_hit].sum() / max(float(is_hit.sum()), 1)
    return found.mean().item()


def per_class(predicted: np.ndarray, targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(hits [C], images [C]) by true class."""
    hits = np.bincount(targets[predicted == targets], minlength=num_classes)
    return hits, np.bincount(targets, minlength=num_classes)


def confusion_pairs(predicted: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> list[dict]:
    """The ten most frequent mistakes: {"true", "predicted", "count", "of"}, the frequent first."""
    wrong = predicted != targets
    pairs, counts = np.unique(np.stack([targets[wrong], predicted[wrong]], 1), axis=0, return_counts=True)
    totals = np.bincount(targets, minlength=len(names))
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))[:10]
    return [
        {
            "true": names[pairs[i][0]],
            "predicted": names[pairs[i][1]],
            "count": int(counts[i]),
            "of": int(totals[pairs[i][0]]),
        }
        for i in order
    ]


def confusion_matrix(predicted: np.ndarray, targets: np.ndarray, num_classes: int) -> list[list[int]]:
    """[C][C] counts: the row is the true class, the column the one that it was taken for."""
    flat = np.bincount(targets * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).tolist()


@dataclass(frozen=True)
class Cells:
    """Independent units of a sample (images), sorted by what they contribute: all that a bootstrap needs.

    Drawing N units with replacement is one multinomial draw of how many come from each cell.
    """

    counts: np.ndarray
    """[K] units in each cell"""
    hits: np.ndarray
    """[K] hits, or the value, that one unit brings"""
    trials: np.ndarray
    """[K] trials that one unit brings"""
    groups: np.ndarray
    """[K] the class; the metric is the mean over classes of hits / trials. All 0: hits / trials"""


def cells_of(hits: np.ndarray, trials: np.ndarray | None = None, groups: np.ndarray | None = None) -> Cells:
    """Sorts units [N] into cells. hits, trials: integers that a unit brings (trials: 1 each where None)."""
    ones, zeros = np.ones(len(hits), np.int64), np.zeros(len(hits), np.int64)
    table = np.stack([hits, ones if trials is None else trials, zeros if groups is None else groups], 1).astype(
        np.int64
    )
    rows, counts = np.unique(table, axis=0, return_counts=True)
    return Cells(counts, rows[:, 0], rows[:, 1], rows[:, 2])


def cells_of_values(values: np.ndarray) -> Cells:
    """Sorts units [N] that bring a number each, of which the metric is the mean."""
    found, counts = np.unique(values, return_counts=True)
    return Cells(counts, found, np.ones(len(found)), np.zeros(len(found), np.int64))


def bootstrap(cells: Cells, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the metric, over units drawn with replacement; always the same one."""
    draw = np.random.default_rng(seed)
    total = cells.counts.sum()
    drawn = draw.multinomial(total, cells.counts / total, size=resamples)  # [R, K]
    _, group = np.unique(cells.groups, return_inverse=True)
    one_hot = np.eye(group.max() + 1)[group]  # [K, G]
    hits, trials = (drawn * cells.hits) @ one_hot, (drawn * cells.trials) @ one_hot
    with np.errstate(invalid="ignore"):
        values = np.nanmean(hits / trials, axis=1)  # a class that was not drawn is left out, as one that never occurs
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def classification_intervals(
    predicted: np.ndarray, rank: np.ndarray, targets: np.ndarray, num_classes: int
) -> dict[str, tuple[float, float]]:
    """95% intervals by metric."""
    intervals = {"acc1": bootstrap(cells_of(rank < 1))}
    if num_classes >= 5:
        intervals["acc5"] = bootstrap(cells_of(rank < 5))
    intervals["mean_per_class_recall"] = bootstrap(cells_of(predicted == targets, groups=targets))
    return intervals


def row(
    step: int,
    weights: str,
    dataset: str,
    task: str,
    metrics: Mapping[str, float],
    num_samples: int,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A line of eval.jsonl."""
    line = {
        "step": step,
        "weights": weights,
        "dataset": dataset,
        "task": task,
        "metrics": dict(metrics),
        "num_samples": num_samples,
    }
    if intervals:
        line["intervals"] = {name: [low, high] for name, (low, high) in intervals.items()}
    return line | more
