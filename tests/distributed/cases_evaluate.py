"""What the evaluation tests run on forked ranks: engines as training has them, evaluated where they are."""

import itertools
from typing import Any

import torch

from amclip_ds import config as settings
from amclip_ds.errors import UserError
from amclip_ds.evaluate import encoder
from amclip_ds.evaluate.during_training import evaluate_engines
from amclip_ds.method import method_of
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import on_all, on_main
from amclip_ds.run import build_engines


def evaluate(
    ds: str, data: str, slices: bool = False, stop_at: int = 0, recorded: tuple[tuple[str, ...], ...] = ()
) -> tuple[list[dict[str, Any]], list[str], str | None]:
    """The rows, what failed and why it stopped, of a tiny student and its teacher at their common start.

    slices: dealt as a padding sampler deals. stop_at: the run is to stop when that is asked for the so many-th time.
    recorded: weights, data set and task of rows that are there.
    """
    if slices:
        encoder._deal = _padded_slices
    runtime = engine_runtime.start()
    config = settings.load(
        "aclip-tiny",
        [
            f"eval.data={data}",
            "eval.batch_size=4",
            f"engine.deepspeed={ds}",
            "heads.hidden_dim=32",
        ],
    )
    student, teacher = build_engines(config, method_of(config), runtime)
    assert teacher is not None
    teacher.publish()
    asked = itertools.count(1)
    found = evaluate_engines(
        student, teacher, config, runtime, 3, lambda: "asked" if next(asked) == stop_at else None, recorded
    )
    torch.distributed.barrier()
    engine_runtime.stop(runtime)
    return tuple(found)


def failing_on_one_rank() -> list[str]:
    """What each rank raises where rank 0 (on_main), or rank 1 alone (on_all), fails; the ranks meet after each."""
    runtime = engine_runtime.start()

    def fail(rank: int, error: Exception) -> str:
        if runtime.rank == rank:
            raise error
        return "done"

    said = []
    for work in (
        lambda: on_main(lambda: fail(0, OSError(28, "No space left on device"))),
        lambda: on_main(lambda: fail(0, UserError("run.out: no"))),
        lambda: on_all(lambda: fail(1, ValueError("odd"))),
        lambda: on_all(lambda: fail(2, ValueError("never"))),
    ):
        try:
            said.append(work())
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        torch.distributed.barrier()
    engine_runtime.stop(runtime)
    return said


def _padded_slices(count: int, batch_size: int, comm: Any) -> list[range]:
    share = -(-count // comm.world_size)
    start = min(comm.rank * share, count - share)
    return [range(n, min(n + batch_size, start + share)) for n in range(start, start + share, batch_size)]
