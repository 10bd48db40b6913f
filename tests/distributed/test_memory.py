"""Model state by part, measured in tensor storages, against the formula of plan/model_state.py (docs/memory.md)."""

from functools import cache

import pytest

from amclip_ds.engine.memory import relative_difference
from amclip_ds.plan.model_state import state_of
from amclip_ds.plan.work import work_of
from tests.distributed.cases_memory import small_settings
from tests.harness import run_ranks

FILES = [f"zero{stage}_fp32.json" for stage in range(4)] + [f"zero{stage}_bf16.json" for stage in (1, 2, 3)]
ALL = [(ds, world_size, optim) for ds in FILES for world_size in (1, 2, 4) for optim in ("adamw", "muon", "lion")]
SOME = {
    ("zero0_fp32.json", 1, "adamw"),
    ("zero1_bf16.json", 2, "muon"),
    ("zero2_bf16.json", 2, "adamw"),
    ("zero3_bf16.json", 4, "muon"),
}


@cache
def by_part(ds: str, world_size: int, optim: str = "adamw") -> list[dict[str, dict[str, float]]]:
    """By rank: {"measured": part -> bytes, "expected": the formula's}."""
    case = "tests.distributed.cases_memory:state_by_part"
    return run_ranks(case, world_size=world_size, timeout_s=600, ds=ds, optim=optim)


@pytest.mark.parametrize(
    ("ds", "world_size", "optim"),
    [cell if cell in SOME else pytest.param(*cell, marks=pytest.mark.nightly) for cell in ALL],
)
def test_model_state_by_part(ds: str, world_size: int, optim: str) -> None:
    for rank, found in enumerate(by_part(ds, world_size, optim)):
        for part, expected in found["expected"].items():
            measured = found["measured"][part]
            assert relative_difference(measured, expected) < 0.01, (rank, part, measured, expected)


def test_another_stage_does_not_fit_the_formula() -> None:
    """The twin: what stage 2 measures, held against stage 3's formula."""
    measured = by_part("zero2_bf16.json", 2)[0]["measured"]
    expected = state_of(work_of(small_settings("zero3_bf16.json"), 2), 0)
    assert relative_difference(measured["parameters"], expected["parameters"]) > 0.3
