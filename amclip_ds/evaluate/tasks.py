"""Which task runs on which set; a row is an eval.jsonl line."""

from typing import Any

from amclip_ds.evaluate.datasets import RETRIEVAL, EvalSet
from amclip_ds.evaluate.encoder import Encoder
from amclip_ds.loss.comm import Comm

DETAILS = ("per_class", "confusions")


def run_task(task: str, encoder: Encoder, data: EvalSet, batch_size: int, comm: Comm, step: int = 0) -> dict[str, Any]:
    """One task of one model on one set. Collective: every rank must call."""
    from amclip_ds.evaluate import retrieval, zero_shot

    if task == RETRIEVAL:
        return retrieval.evaluate(encoder, data, batch_size, comm, step)
    return zero_shot.evaluate(encoder, data, batch_size, comm, step)


def short(row: dict[str, Any]) -> dict[str, Any]:
    """The row without its tables."""
    return {key: value for key, value in row.items() if key not in DETAILS}
