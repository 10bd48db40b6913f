"""Accuracies, recalls per class and intervals against slow references, on random and on tied scores."""

import numpy as np
import pytest
import torch

from amclip_ds.errors import UserError
from amclip_ds.evaluate import metrics


def scores_and_targets(tied: bool, num_classes: int = 7):
    draw, shape = np.random.default_rng(0), (200, num_classes)
    scores = draw.integers(0, 3, shape) if tied else draw.standard_normal(shape)
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(draw.integers(0, num_classes, 200))


def slow_ranks(scores: torch.Tensor, targets: torch.Tensor) -> list[list[int]]:
    """Each row's classes sorted by score, equal ones by number: where the target is, and the first."""
    found = []
    for row, target in zip(scores.tolist(), targets.tolist()):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        found.append([order[0], order.index(target)])
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_classes", [2, 4, 7])
def test_classification_equals_a_slow_reference(tied: bool, num_classes: int) -> None:
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    scores, targets = scores_and_targets(tied, num_classes)
    judged = metrics.classify(scores, targets)
    assert judged.tolist() == slow_ranks(scores, targets)
    predicted, rank, labels = judged[:, 0].numpy(), judged[:, 1].numpy(), targets.numpy()
    lead = (scores[:, 1] - scores[:, 0]).numpy() if num_classes == 2 else None
    found = metrics.classification_metrics(predicted, rank, labels, num_classes, lead)
    slow = slow_ranks(scores, targets)
    assert found["acc1"] == sum(place < 1 for _, place in slow) / len(slow)
    assert found["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, [p for p, _ in slow]))
    if num_classes >= 5:
        assert found["acc5"] == sum(place < 5 for _, place in slow) / len(slow)
    else:
        assert "acc5" not in found
    if num_classes == 2:
        assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, scores.double().softmax(1)[:, 1]))
        assert found["roc_auc"] == pytest.approx(slow_auc(lead.tolist(), labels.tolist()))
        swapped = metrics.classification_metrics(1 - predicted, rank, 1 - labels, num_classes, -lead)
        assert swapped["roc_auc"] == found["roc_auc"]


def slow_auc(scores: list[float], labels: list[int]) -> float:
    pairs = [(p > n) + 0.5 * (p == n) for p, lp in zip(scores, labels) if lp for n, ln in zip(scores, labels) if not ln]
    return sum(pairs) / len(pairs)


def test_any_other_rule_for_ties_would_be_seen() -> None:
    """The twin: counting ties for, or against, the target gives other numbers on these scores."""
    scores, targets = scores_and_targets(tied=True)
    own = scores.gather(1, targets[:, None])
    right = metrics.classify(scores, targets)[:, 1]
    assert ((scores > own).sum(1) != right).any() and ((scores >= own).sum(1) - 1 != right).any()


def test_a_collapsed_model_is_at_chance() -> None:
    targets = torch.arange(60) % 6
    judged = metrics.classify(torch.zeros(60, 6), targets)
    assert (judged[:, 1] < 1).float().mean() == pytest.approx(1 / 6)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores, targets = scores_and_targets(False)
    scores[3, 2] = float("nan")
    with pytest.raises(UserError, match="finite"):
        metrics.classify(scores, targets)
    with pytest.raises(UserError, match="finite"):
        metrics.mean_average_precision(scores, torch.ones(scores.shape))


def test_confusions_are_counted() -> None:
    targets, predicted = np.array([0, 0, 0, 1, 2, 2]), np.array([1, 1, 0, 1, 0, 2])
    assert metrics.confusion_pairs(predicted, targets, ["a", "b", "c"]) == [
        {"true": "a", "predicted": "b", "count": 2, "of": 3},
        {"true": "c", "predicted": "a", "count": 1, "of": 2},
    ]
    assert metrics.confusion_pairs(targets, targets, ["a", "b", "c"]) == []


def slow_bootstrap(value, num: int) -> tuple[float, float]:
    """Draws units one by one."""
    draw = np.random.default_rng(1)
    values = [value(draw.integers(0, num, num)) for _ in range(4000)]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def test_intervals_equal_a_slow_bootstrap() -> None:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 3, 150)
    hits = (draw.random(150) < np.array([0.9, 0.5, 0.2])[targets]).astype(int)

    def mean_per_class(chosen: np.ndarray) -> float:
        return float(np.mean([hits[chosen][targets[chosen] == c].mean() for c in range(3)]))

    for cells, value in [
        (metrics.cells_of(hits), lambda chosen: hits[chosen].mean()),
        (metrics.cells_of(hits, groups=targets), mean_per_class),
    ]:
        assert metrics.bootstrap(cells, resamples=4000) == pytest.approx(slow_bootstrap(value, 150), abs=0.012)
    # several captions an image: images are drawn, not captions
    trials = draw.integers(1, 6, 150)
    found = draw.binomial(1, 0.5, 150) * trials  # all captions of an image, or none
    clustered = metrics.bootstrap(metrics.cells_of(found, trials), resamples=4000)
    assert clustered == pytest.approx(
        slow_bootstrap(lambda chosen: found[chosen].sum() / trials[chosen].sum(), 150), abs=0.012
    )
    alone = metrics.bootstrap(metrics.cells_of(np.repeat(found > 0, trials)), resamples=4000)
    assert clustered[1] - clustered[0] > 1.4 * (alone[1] - alone[0])  # the twin: captions drawn alone look too sure


def test_an_interval_is_repeatable() -> None:
    cells = metrics.cells_of(np.arange(50) % 3 == 0)
    assert metrics.bootstrap(cells) == metrics.bootstrap(cells) != metrics.bootstrap(cells, seed=1)
