"""WinoGAViL's games: of the candidates, those nearest to the cue, as many as people chose, against what people chose.

A game's score is Jaccard's index, the shared pictures over all that either chose, and the metrics are its mean over the
games of 5, 6, 10 or 12 candidates, by DataComp's names. Equal cosines are ranked by place, the first candidate first.

Shapes: G games, I images, E embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.evaluate import metrics
from amclip_ds.evaluate.datasets import ASSOCIATION, EvalSet
from amclip_ds.evaluate.encoder import Encoder, encode_images, encode_texts
from amclip_ds.evaluate.winogavil import Game

GROUPS = {"5": (5, 5), "6": (6, 6), "10": (10, 10), "12": (12, 12), "5-6": (0, 6), "10-12": (10, 1 << 30)}
"""name -> least and most candidates"""


def evaluate(encoder: Encoder, data: EvalSet, batch_size: int, comm: Comm, step: int = 0) -> dict[str, Any]:
    """One row of eval.jsonl; the same on every rank. Collective: every rank must call."""
    images = encode_images(encoder, data.samples, batch_size, comm).cpu()
    prompts = list(dict.fromkeys(game.prompt for game in data.games))
    texts = dict(zip(prompts, encode_texts(encoder, prompts, batch_size, comm).cpu()))
    scores = jaccard(images, [texts[game.prompt] for game in data.games], data.games)
    of_metric = {"avg_jaccard_score": scores}
    sizes = np.array([len(game.candidates) for game in data.games])
    for name, (least, most) in GROUPS.items():
        chosen = scores[(least <= sizes) & (sizes <= most)]
        if len(chosen):  # a mean of none is no number
            of_metric[f"jaccard_score_{name}"] = chosen
    return metrics.row(
        step,
        encoder.weights,
        data.name,
        ASSOCIATION,
        {name: float(some.mean()) for name, some in of_metric.items()},
        len(data.games),
        {name: metrics.bootstrap(metrics.cells_of_values(some)) for name, some in of_metric.items()},
        main_metric="jaccard_score_10-12" if "jaccard_score_10-12" in of_metric else "avg_jaccard_score",
    )


def jaccard(images: Tensor, texts: Sequence[Tensor], games: Sequence[Game]) -> np.ndarray:
    """images [I, E], a text [E] for each game -> [G] the index of each game, in fp64.

    Raises UserError for embeddings that are not finite.
    """
    if not torch.isfinite(images).all() or not all(torch.isfinite(text).all() for text in texts):
        raise UserError(metrics.NOT_FINITE)
    found = np.empty(len(games))
    for number, (game, text) in enumerate(zip(games, texts, strict=True)):
        cosines = images[list(game.candidates)] @ text
        associated = np.array(game.associated)
        count = int(associated.sum())
        chosen = cosines.sort(descending=True, stable=True).indices[:count].numpy()
        shared = int(associated[chosen].sum())
        found[number] = shared / (2 * count - shared)
    return found
