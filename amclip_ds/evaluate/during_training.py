"""Evaluation between two steps: the engines as they stand, student and teacher, on the sets of `eval.data`."""

from typing import Any

from amclip_ds.config import TrainConfig
from amclip_ds.engine.collectives import DistributedComm
from amclip_ds.engine.runtime import Runtime
from amclip_ds.engine.student import StudentEngine
from amclip_ds.evaluate.datasets import EvalSet, open_set
from amclip_ds.evaluate.encoder import TowerEncoder
from amclip_ds.evaluate.tasks import run_task, short
from amclip_ds.teacher import Teacher


def sets_of(config: TrainConfig) -> list[EvalSet]:
    """The sets of eval.data. Raises UserError for one that cannot be read."""
    return [open_set(spec) for spec in config.eval.data.split("::")] if config.eval.data else []


def evaluate_engines(
    student: StudentEngine, teacher: Teacher | None, config: TrainConfig, runtime: Runtime, step: int
) -> list[dict[str, Any]]:
    """The rows of eval.jsonl: each set of eval.data with the student and, where there is one, the teacher.

    The same rows on every rank. The teacher must be published whole. Raises UserError for a set that cannot be read.
    Collective: every rank must call.
    """
    comm = DistributedComm()
    rows = []
    for data in sets_of(config):
        for name, engine in (("student", student), ("teacher", teacher)):
            if engine is not None:
                encoder = TowerEncoder(engine.forward, name, config.model.vision.image_size,
                                       config.model.text.context_length, runtime.device)  # fmt: skip
                rows.append(short(run_task(data.task, encoder, data, config.eval.batch_size, comm, step)))
    return rows
