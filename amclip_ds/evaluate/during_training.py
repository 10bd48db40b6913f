"""Evaluation between two steps: the engines as they are, student and teacher, on the sets of `eval.data`."""

from functools import partial
from typing import Any

from amclip_ds.config import TrainConfig
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.errors import AmclipError
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.encoder import TowerEncoder
from amclip_ds.evaluate.tasks import run_task
from amclip_ds.ranks.collectives import DistributedComm, on_all
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.shards.sources import split_sources


def specs_of(config: TrainConfig) -> list[str]:
    """What eval.data names, set by set."""
    return split_sources(config.eval.data) if config.eval.data else []


def evaluate_engines(
    student: StudentEngine, teacher: Teacher | None, config: TrainConfig, runtime: Runtime, step: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """(the rows of eval.jsonl, what failed): each set of eval.data with the student and, if there is one, the teacher.

    A set that fails costs its own rows alone, and a line each says why. The same on every rank. The teacher must be
    published whole. Collective: every rank must call.
    """
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    engines = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    encoders = [
        TowerEncoder(engine, name, config.model.vision.image_size, config.model.text.context_length, runtime.device)
        for name, engine in engines.items()
    ]
    for spec in specs_of(config):
        try:  # what is raised here is raised on every rank alike: the collectives stay in step
            data = on_all(partial(open_set, spec, key="eval.data"))
            for encoder in encoders:
                rows.append(run_task(data.task, encoder, data, config.eval.batch_size, DistributedComm(), step))
        except AmclipError as error:
            failures.append(f"{spec}: {str(error).removeprefix('eval.data: ')}")
    return rows, failures
