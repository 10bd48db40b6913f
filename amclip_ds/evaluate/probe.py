"""What the image tower alone is worth: linear probe (CLIP's protocol) and k-NN on its features.

Features of both splits are computed once, all ranks sharing the work. For our models they are the CLS feature that the
heads read, before the projection; for a library's model the embedding.

The linear probe is scikit-learn's logistic regression (L-BFGS, at most 1000 iterations). C is chosen as CLIP chose it:
on a held-out part of the training split, first from 1e-6 ... 1e6 in steps of 100, then by halving the step around the
best until it is an eighth of a decade; then the whole training split is fitted with it.

Shapes: N images, D feature width, C classes.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.evaluate import metrics, zero_shot
from amclip_ds.evaluate.datasets import EvalSet
from amclip_ds.evaluate.encoder import Encoder, encode_images, share_rows
from amclip_ds.ranks.collectives import on_main

FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINEST_STEP = 1 / 8  # decades
HELD_OUT = 0.2  # of the training split, while C is chosen
MAX_ITERATIONS = 1000
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN, as DINO reports it
QUERIES = 256


def features_of(encoder: Encoder, data: EvalSet, batch_size: int, comm: Comm) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D] fp32, labels [N]) on every rank. Collective: every rank must call.

    Raises UserError for features that are not finite, of which a probe learns nothing.
    """
    found = encode_images(FeatureView(encoder), data.samples, batch_size, comm)
    if not torch.isfinite(found).all():
        raise UserError(metrics.NOT_FINITE)
    return found.cpu().numpy(), np.array([sample.label for sample in data.samples])


class FeatureView:
    """An encoder whose `image` gives the features of the tower."""

    def __init__(self, encoder: Encoder) -> None:
        self.preprocess, self.image_size, self.image = encoder.preprocess, encoder.image_size, encoder.features
        self.weights, self.text, self.features = encoder.weights, encoder.text, encoder.features
        self.say = encoder.say


def linear_probe(
    encoder: Encoder, train: EvalSet, test: EvalSet, batch_size: int, comm: Comm, step: int = 0
) -> dict[str, Any]:
    """One row of eval.jsonl, with `best_c`; the same on every rank. Collective: every rank must call."""
    check_same_classes(train, test)
    train_features, train_labels = features_of(encoder, train, batch_size, comm)
    test_features, test_labels = features_of(encoder, test, batch_size, comm)
    scores, lead, best_c = on_main(lambda: probe(train_features, train_labels, test_features, len(test.classnames)))
    return _row("linear_probe", scores, lead, test_labels, encoder, test, step) | {
        "best_c": best_c,
        "num_train": len(train),
    }


def probe(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """(log-probabilities [N, C] of the test features, how far they are on the second class's side, the chosen C).

    A class without training images gets -1e9. The second [N] is of two classes: the difference of their
    log-probabilities, which are too coarse for it where C is small.
    """
    held_out = _held_out(train_labels)
    fit_part, check_part = np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def accuracy(exponent: float) -> float:
        model = _fit(train_features[fit_part], train_labels[fit_part], exponent)
        return float((model.predict(train_features[check_part]) == train_labels[check_part]).mean())

    best = sweep(accuracy)
    model = _fit(train_features, train_labels, best)
    scores = np.full((len(test_features), num_classes), -1e9, np.float32)
    scores[:, model.classes_] = model.predict_log_proba(test_features)
    return np.maximum(scores, -1e9), model.decision_function(test_features), 10.0**best


def sweep(accuracy: Any) -> float:
    """The exponent of C with the highest accuracy: a coarse grid, then ever finer steps around the best so far.

    Equal accuracies: the smallest C.
    """
    seen = {exponent: accuracy(exponent) for exponent in FIRST_EXPONENTS}
    step = (FIRST_EXPONENTS[1] - FIRST_EXPONENTS[0]) / 2
    while step >= FINEST_STEP:
        best = _best(seen)
        for exponent in (best - step, best + step):
            if FIRST_EXPONENTS[0] <= exponent <= FIRST_EXPONENTS[-1] and exponent not in seen:
                seen[exponent] = accuracy(exponent)
        step /= 2
    return _best(seen)


def _best(seen: dict[float, float]) -> float:
    return max(sorted(seen), key=lambda exponent: seen[exponent])


def _fit(features: np.ndarray, labels: np.ndarray, exponent: float) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the weakest regularisation 1000 iterations may not do
        return LogisticRegression(C=10.0**exponent, max_iter=MAX_ITERATIONS).fit(features, labels)


def _held_out(labels: np.ndarray) -> np.ndarray:
    """[N] bool: every fifth image of each class, so that both parts know every class that has two images or more."""
    held = np.zeros(len(labels), bool)
    period = round(1 / HELD_OUT)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        held[places[min(1, len(places) - 1) :: period]] = len(places) > 1
    if not held.any() or len(np.unique(labels[~held])) < 2:
        raise UserError("--task linear_probe: the training split needs two classes and two images of one at least")
    return held


def knn(
    encoder: Encoder,
    train: EvalSet,
    test: EvalSet,
    batch_size: int,
    comm: Comm,
    step: int = 0,
    neighbours: int = NEIGHBOURS,
) -> dict[str, Any]:
    """One row of eval.jsonl; the same on every rank. Collective: every rank must call."""
    check_same_classes(train, test)
    train_features, train_labels = features_of(encoder, train, batch_size, comm)
    test_features, test_labels = features_of(encoder, test, batch_size, comm)
    scores = vote(
        torch.from_numpy(train_features),
        torch.from_numpy(train_labels),
        torch.from_numpy(test_features),
        len(test.classnames),
        min(neighbours, len(train)),
        comm,
    ).numpy()
    votes = scores.astype(np.float64)
    lead = (votes[:, 1] - votes[:, 0]) / votes.sum(1)  # a share: how near the neighbours are is no class
    return _row("knn", scores, lead, test_labels, encoder, test, step) | {
        "neighbours": min(neighbours, len(train)),
        "num_train": len(train),
    }


def vote(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, neighbours: int, comm: Comm) -> Tensor:
    """Scores [N, C]: the k nearest by cosine vote with weight exp(cosine / 0.07); equal cosines by number.

    Collective: every rank must call.
    """
    from amclip_ds.evaluate.retrieval import top_k

    train, test = F.normalize(train, dim=-1), F.normalize(test, dim=-1)

    def work(numbers: range) -> Tensor:
        block = test.new_zeros(QUERIES, test.shape[1])
        block[: len(numbers)] = test[numbers.start : numbers.stop]
        cosines = block @ train.T
        nearest = top_k(cosines, neighbours)
        weights = (cosines.gather(1, nearest) / TEMPERATURE).exp()
        scores = torch.zeros(QUERIES, num_classes).scatter_add_(1, labels[nearest], weights)
        return scores[: len(numbers)]

    return share_rows(len(test), QUERIES, comm, work)


def check_same_classes(train: EvalSet, test: EvalSet) -> None:
    if train.classnames != test.classnames:
        raise UserError(f"--data {test.folder}: the training split has other class names than the test split")


def _row(
    task: str, scores: np.ndarray, lead: np.ndarray, labels: np.ndarray, encoder: Encoder, test: EvalSet, step: int
) -> dict[str, Any]:
    judged = metrics.classify(torch.from_numpy(scores), torch.from_numpy(labels)).numpy()
    return zero_shot.describe(judged[:, 0], judged[:, 1], labels, lead, encoder.weights, test, step, task)
