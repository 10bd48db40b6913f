"""Image-text retrieval with several captions an image (the Flickr30K and COCO Karpathy protocol).

text_retrieval_recall@k: of the images, those that find one of their captions among the first k texts.
image_retrieval_recall@k: of the captions, those that find their image among the first k images.
Equal scores are ranked by place, the lowest first (metrics.py).

Scores are computed in blocks of fixed size, shared by the ranks, of which only the first k of each query stay: memory
is the embeddings and one block, for any number of pairs. 1 M images with 5 M captions at width 512: 12.3 GB of
embeddings on each rank, blocks of 64 MB, 5 TB of scores that are never held.

Shapes: Q queries, M candidates, E embedding, I images, T texts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.evaluate import metrics
from amclip_ds.evaluate.datasets import EvalSet
from amclip_ds.evaluate.encoder import Encoder, encode_images, encode_texts, share_rows

KS = (1, 5, 10)
QUERIES, CANDIDATES = 1024, 16384  # a block of scores: 64 MB


def evaluate(encoder: Encoder, data: EvalSet, batch_size: int, comm: Comm, step: int = 0) -> dict[str, Any]:
    """One row of eval.jsonl; the same on every rank. Collective: every rank must call."""
    captions = [caption for sample in data.samples for caption in sample.captions]
    image_of_text = torch.tensor([i for i, sample in enumerate(data.samples) for _ in sample.captions])
    images = encode_images(encoder, data.samples, batch_size, comm)
    texts = encode_texts(encoder, captions, batch_size, comm)
    found = recalls(images, texts, image_of_text, comm)
    return metrics.row(
        step,
        encoder.weights,
        data.name,
        "retrieval",
        found.metrics(),
        len(data.samples),
        found.intervals(),
        num_texts=len(captions),
    )


class Found:
    """At which place each query found its own: [I] and [T], a place of max(KS) or more meaning not among the first."""

    def __init__(self, text_places: np.ndarray, image_places: np.ndarray, image_of_text: np.ndarray) -> None:
        self.text_places, self.image_places, self.image_of_text = text_places, image_places, image_of_text

    def metrics(self) -> dict[str, float]:
        """Recalls by CLIP_benchmark's names."""
        return {f"image_retrieval_recall@{k}": float((self.image_places < k).mean()) for k in KS} | {
            f"text_retrieval_recall@{k}": float((self.text_places < k).mean()) for k in KS
        }

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% intervals; images are drawn, and an image brings all its captions."""
        num_images = len(self.text_places)
        trials = np.bincount(self.image_of_text, minlength=num_images)
        intervals = {}
        for k in KS:
            hits = np.bincount(self.image_of_text[self.image_places < k], minlength=num_images)
            intervals[f"image_retrieval_recall@{k}"] = metrics.bootstrap(metrics.cells_of(hits, trials))
            intervals[f"text_retrieval_recall@{k}"] = metrics.bootstrap(metrics.cells_of(self.text_places < k))
        return intervals


def recalls(images: Tensor, texts: Tensor, image_of_text: Tensor, comm: Comm) -> Found:
    """images [I, E], texts [T, E], image_of_text [T] int64, whole on every rank -> where each finds its own.

    Raises UserError for embeddings that are not finite. Collective: every rank must call.
    """
    image_of_text = image_of_text.to(images.device)
    nearest_texts = first_k(images, texts, max(KS), comm)  # [I, k]
    nearest_images = first_k(texts, images, max(KS), comm)  # [T, k]
    own_text = image_of_text[nearest_texts] == torch.arange(len(images), device=images.device)[:, None]
    own_image = nearest_images == image_of_text[:, None]
    return Found(_first_place(own_text), _first_place(own_image), image_of_text.cpu().numpy())


def _first_place(own: Tensor) -> np.ndarray:
    """[Q, k] bool -> [Q] the first true place, k where there is none."""
    places = torch.where(own.any(1), own.int().argmax(1), own.shape[1])
    return places.cpu().numpy() if own.shape[1] >= max(KS) else np.where(own.any(1).cpu(), places.cpu(), max(KS))


def first_k(queries: Tensor, candidates: Tensor, k: int, comm: Comm) -> Tensor:
    """queries [Q, E], candidates [M, E] -> [Q, min(k, M)] numbers of the highest scores, high first, ties by number.

    The blocks are the same in every world, so the scores are. Collective: every rank must call.
    """
    if not (torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
        raise UserError(metrics.NOT_FINITE)
    return share_rows(len(queries), QUERIES, comm, lambda numbers: _first_k(queries, numbers, candidates, k))


def _first_k(queries: Tensor, numbers: range, candidates: Tensor, k: int) -> Tensor:
    """One block of queries against all candidates, a block of them at a time."""
    block = queries.new_zeros(QUERIES, queries.shape[1])  # always full, so that a row's bits do not depend on the rest
    block[: len(numbers)] = queries[numbers.start : numbers.stop]
    best_scores = best_numbers = None
    for start in range(0, len(candidates), CANDIDATES):
        scores = block @ candidates[start : start + CANDIDATES].T
        numbers_here = top_k(scores, k)
        scores_here = scores.gather(1, numbers_here)
        numbers_here = numbers_here + start
        if best_scores is not None and best_numbers is not None:  # earlier numbers are lower: a stable sort keeps them
            scores_here = torch.cat([best_scores, scores_here], 1)
            numbers_here = torch.cat([best_numbers, numbers_here], 1)
            scores_here, order = scores_here.sort(dim=1, descending=True, stable=True)
            numbers_here = numbers_here.gather(1, order)
        best_scores, best_numbers = scores_here[:, :k], numbers_here[:, :k]
    assert best_numbers is not None
    return best_numbers[: len(numbers)]


def top_k(scores: Tensor, k: int) -> Tensor:
    """[Q, M] -> [Q, min(k, M)] numbers of the highest, high first, ties by number (torch.topk takes any of equals)."""
    k = min(k, scores.shape[1])
    values, numbers = scores.topk(k, dim=1)
    last = values[:, -1:]
    is_unsure = (scores == last).sum(1) > (values == last).sum(1)  # equals of the last one were left out
    if is_unsure.any():
        numbers[is_unsure] = scores[is_unsure].sort(dim=1, descending=True, stable=True).indices[:, :k]
    numbers = numbers.sort(dim=1).values
    order = scores.gather(1, numbers).sort(dim=1, descending=True, stable=True).indices
    return numbers.gather(1, order)
