"""Evaluation between two steps: the engines as they are, student and teacher, on the sets of `eval.data`."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from amclip_ds.config import TrainConfig
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.errors import AmclipError, RunStopped
from amclip_ds.evaluate.datasets import open_set
from amclip_ds.evaluate.encoder import TowerEncoder
from amclip_ds.evaluate.tasks import run_task
from amclip_ds.ranks.collectives import DistributedComm, on_all
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.shards.sources import split_sources


def specs_of(config: TrainConfig) -> list[str]:
    """What eval.data names, each set once."""
    return list(dict.fromkeys(split_sources(config.eval.data))) if config.eval.data else []


class Evaluated(NamedTuple):
    """What an evaluation came to; the same on every rank."""

    rows: list[dict[str, Any]]
    """of eval.jsonl"""
    failures: list[str]
    """a line for each set that failed"""
    stop: str | None
    """why the run is to stop, where that ended the evaluation early; else None"""


def evaluate_engines(
    student: StudentEngine,
    teacher: Teacher | None,
    config: TrainConfig,
    runtime: Runtime,
    step: int,
    stop: Callable[[], str | None] = lambda: None,
    recorded: Collection[tuple[str, ...]] = (),
) -> Evaluated:
    """Each set of eval.data with the student and, if there is one, the teacher.

    A set that fails costs its own rows alone. recorded: (weights, data set, task) of rows that are not made again; the
    same on every rank. stop: why the run is to stop, agreed among the ranks, or None; asked
    before every set and batch, and what it raises is raised. The teacher must be published whole.
    Collective: every rank must call.
    """
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    engines = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    encoders = [
        _StoppableEncoder(
            stop, engine, name, config.model.vision.image_size, config.model.text.context_length, runtime.device
        )
        for name, engine in engines.items()
    ]
    for spec in specs_of(config):
        try:  # what is raised here is raised on every rank alike: the collectives stay in step
            _heed(stop)
            data = on_all(partial(open_set, spec, key="eval.data"))
            for encoder in encoders:
                if (encoder.weights, data.name, data.task) not in recorded:
                    rows.append(run_task(data.task, encoder, data, config.eval.batch_size, DistributedComm(), step))
        except _Stopped as stopped:
            return Evaluated(rows, failures, str(stopped))
        except RunStopped:  # by `stop`: another trainer has the folder
            raise
        except AmclipError as error:
            failures.append(f"{spec}: {str(error).removeprefix('eval.data: ')}")
    return Evaluated(rows, failures, None)


class _Stopped(Exception):
    """The run is to stop, for this reason."""


def _heed(stop: Callable[[], str | None]) -> None:
    """Raises _Stopped, on every rank alike, where the run is to stop. Collective: every rank must call."""
    if reason := stop():
        raise _Stopped(reason)


class _StoppableEncoder(TowerEncoder):
    """Asks before each batch, of which every rank has as many, whether the run is to stop."""

    def __init__(self, stop: Callable[[], str | None], *tower: Any) -> None:
        super().__init__(*tower)
        self._stop = stop

    def image(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """uint8 [B, 3, H, H] -> [B, E]. Collective: every rank must call."""
        _heed(self._stop)
        return super().image(images, numbers)

    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [B, E]. Collective: every rank must call."""
        _heed(self._stop)
        return super().text(texts)
