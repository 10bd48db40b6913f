"""The sharded average is the dense one, bit for bit; a bf16 average is not; publishing is what the forward sees."""

import pytest

from tests.harness import run_ranks

FILES = [f"zero{stage}_fp32.json" for stage in range(4)] + [f"zero{stage}_bf16.json" for stage in (1, 2, 3)]
IN_TEST = pytest.param("zero2_bf16.json", 30, id="zero2_bf16 30")
NIGHTLY = [pytest.param(ds, 100, id=f"{ds.removesuffix('.json')} 100", marks=pytest.mark.nightly) for ds in FILES]


def check(ds: str, steps: int, **settings: str) -> None:
    found = run_ranks("tests.distributed.cases_engine:ema", timeout_s=1200, ds=ds, steps=steps, **settings)[0]
    assert found["error"] == 0.0
    assert found["moved"] > 1e-3 and found["frozen_moved"] == 0.0
    assert found["bf16_error"] > 0.1 * found["moved"]  # the twin: an average kept in bf16 hardly moves
    assert found["published_error"] <= (1e-6 if "fp32" in ds else 1e-2)
    assert found["unpublished_change"] == 0.0 and found["published_change"] > 1e-4


@pytest.mark.parametrize(("ds", "steps"), [IN_TEST, *NIGHTLY])
def test_the_average_after_many_steps(ds: str, steps: int) -> None:
    check(ds, steps)


@pytest.mark.nightly
def test_the_average_published_whole_at_stage_3() -> None:
    check("zero3_bf16.json", steps=100, placement="replicated")
