"""What the evaluation tests run on forked ranks: engines as training has them, evaluated where they stand."""

from typing import Any

from amclip_ds import config as settings
from amclip_ds.engine import runtime as engine_runtime
from amclip_ds.engine.student import StudentEngine
from amclip_ds.evaluate import encoder
from amclip_ds.evaluate.during_training import evaluate_engines
from amclip_ds.teacher import Teacher


def evaluate(ds: str, data: str, slices: bool = False) -> list[dict[str, Any]]:
    """The rows of a tiny student and its teacher at their common start; `slices`: dealt as a padding sampler deals."""
    if slices:
        encoder._deal = _padded_slices
    runtime = engine_runtime.start()
    config = settings.load("aclip-tiny", [
        f"eval.data={data}", "eval.batch_size=4", f"engine.deepspeed={ds}", "heads.hidden_dim=32",
    ])  # fmt: skip
    student = StudentEngine(config.model, config.heads, config.loss, config.optim, config.engine, seed=0,
                            runtime=runtime)  # fmt: skip
    teacher = Teacher(config.teacher, config.model, config.heads, config.loss, compat="paper", seed=0, student=student,
                      device=runtime.device)  # fmt: skip
    teacher.publish()
    rows = evaluate_engines(student, teacher, config, runtime, step=3)
    engine_runtime.stop(runtime)
    return rows


def _padded_slices(count: int, batch_size: int, comm: Any) -> list[range]:
    share = -(-count // comm.world_size)
    start = min(comm.rank * share, count - share)
    return [range(n, min(n + batch_size, start + share)) for n in range(start, start + share, batch_size)]
