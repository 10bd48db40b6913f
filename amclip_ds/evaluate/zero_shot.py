"""Zero-shot classification: a class is the mean of its prompts' embeddings (CLIP's protocol, arXiv 2103.00020).

Shapes: N images, C classes, P prompts a class, E embedding.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.evaluate import metrics
from amclip_ds.evaluate.datasets import CLASSIFICATION, EvalSet
from amclip_ds.evaluate.encoder import Encoder, encode_images, encode_texts
from amclip_ds.evaluate.set_names import MAIN_METRIC, known_name

LARGEST_MATRIX = 100  # classes
_classifiers: WeakKeyDictionary[Any, dict[Any, Tensor]] = WeakKeyDictionary()


def build_classifier(
    encoder: Encoder, classnames: tuple[str, ...], templates: tuple[str, ...], batch_size: int, comm: Comm
) -> Tensor:
    """[C, E]: per class the renormalised mean of its prompts' unit embeddings. Kept for as long as the encoder lives.

    Collective: every rank must call.
    """
    kept = _classifiers.setdefault(encoder, {})
    key = (classnames, templates, batch_size)
    if key not in kept:
        prompts = [template.replace("{c}", name) for name in classnames for template in templates]
        embeddings = encode_texts(encoder, prompts, batch_size, comm).unflatten(0, (len(classnames), len(templates)))
        kept[key] = F.normalize(embeddings.mean(1), dim=-1)
    return kept[key]


def evaluate(encoder: Encoder, data: EvalSet, batch_size: int, comm: Comm, step: int = 0) -> dict[str, Any]:
    """One row of eval.jsonl, with `per_class` and `confusions` beside the metrics; the same on every rank.

    Collective: every rank must call.
    """
    classifier = build_classifier(encoder, data.classnames, data.templates, batch_size, comm)
    if data.is_multilabel:
        scores = encode_images(encoder, data.samples, batch_size, comm, then=lambda rows, _: rows @ classifier.T).cpu()
        targets = torch.tensor([sample.numbers for sample in data.samples])
        found = {metrics.MEAN_AVERAGE_PRECISION: metrics.mean_average_precision(scores, targets)}
        return metrics.row(
            step,
            encoder.weights,
            data.name,
            CLASSIFICATION,
            found,
            len(targets),
            main_metric=metrics.MEAN_AVERAGE_PRECISION,
        )
    labels = torch.tensor([sample.label for sample in data.samples], device=classifier.device)

    def judge(embeddings: Tensor, numbers: range) -> Tensor:
        scores = embeddings @ classifier.T
        found = metrics.classify(scores, labels[numbers.start : numbers.stop]).double()  # exact far beyond any count
        lead = scores[:, 1:2].double() - scores[:, :1].double()  # of two classes; of more nothing reads it
        return torch.cat([found, lead], dim=1)

    judged = encode_images(encoder, data.samples, batch_size, comm, then=judge).cpu().numpy()
    predicted, rank = judged[:, 0].astype(np.int64), judged[:, 1].astype(np.int64)
    return describe(predicted, rank, labels.cpu().numpy(), judged[:, 2], encoder.weights, data, step)


def describe(
    predicted: np.ndarray,
    rank: np.ndarray,
    targets: np.ndarray,
    second_class_lead: np.ndarray | None,
    weights: str,
    data: EvalSet,
    step: int,
    task: str = CLASSIFICATION,
) -> dict[str, Any]:
    """The row of a classification, whatever made it. second_class_lead: metrics.classification_metrics."""
    num_classes = len(data.classnames)
    lead = second_class_lead if num_classes == 2 else None
    hits, totals = metrics.per_class(predicted, targets, num_classes)
    name = known_name(data.name)
    found = metrics.classification_metrics(predicted, rank, targets, num_classes, lead)
    found |= metrics.metrics_of_set(name, predicted, rank, targets, data.groups)
    return metrics.row(
        step,
        weights,
        data.name,
        task,
        found,
        len(targets),
        metrics.classification_intervals(predicted, rank, targets, num_classes),
        main_metric=MAIN_METRIC.get(name, "acc1"),
        per_class=dict(zip(_distinct(data.classnames), np.stack([hits, totals], 1).tolist())),
        confusions=metrics.confusion_pairs(predicted, targets, data.classnames),
        **(
            {"confusion_matrix": metrics.confusion_matrix(predicted, targets, num_classes)}
            if num_classes <= LARGEST_MATRIX
            else {}
        ),
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """ImageNet has two classes called `missile` and two called `sunglasses`: those get their label too."""
    return [f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)]
