"""Which task runs on which set; a row is an eval.jsonl line."""

from typing import Any

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.evaluate.datasets import ASSOCIATION, CLASSIFICATION, RETRIEVAL, EvalSet, open_set
from amclip_ds.evaluate.encoder import Encoder
from amclip_ds.run_files import PROBES


def run_task(
    task: str, encoder: Encoder, data: EvalSet, batch_size: int, comm: Comm, step: int = 0, train: EvalSet | None = None
) -> dict[str, Any]:
    """One task of one model on one set. train: the split that probes learn from.

    Collective: every rank must call. Raises UserError for a task that the set is not for.
    """
    from amclip_ds.evaluate import association, probe, retrieval, zero_shot

    if data.task != (CLASSIFICATION if task in PROBES else task):
        raise UserError(f"--task {task}: {data.folder} is a set for {data.task}")
    if task == RETRIEVAL:
        row = retrieval.evaluate(encoder, data, batch_size, comm, step)
    elif task == ASSOCIATION:
        row = association.evaluate(encoder, data, batch_size, comm, step)
    elif task == CLASSIFICATION:
        row = zero_shot.evaluate(encoder, data, batch_size, comm, step)
    else:
        assert train is not None
        learn = probe.linear_probe if task == "linear_probe" else probe.knn
        row = learn(encoder, train, data, batch_size, comm, step)
    return row | {"images": data.images} | dict(data.asked)


def open_for(
    task: str, spec: str, split: str, classnames: str, templates: str, key: str
) -> tuple[str, EvalSet, EvalSet | None]:
    """(task, the split to evaluate, the split that probes learn from). `auto` becomes what the set is for.

    Raises UserError, also for a probe of what it cannot learn.
    """
    if task not in PROBES:
        data = open_set(spec, split, task, classnames, templates, key)
        return data.task, data, None
    data = open_set(spec, split, CLASSIFICATION, classnames, "none", key)
    if data.is_multilabel:
        raise UserError(f"--task {task}: {spec} has several labels an image; a probe learns one")
    train = open_set(spec, "train", CLASSIFICATION, classnames, "none", key)
    if train.samples == data.samples:
        raise UserError(f"--task {task}: {spec} has one split; a probe learns from `train` and is tested on another")
    return task, data, train
