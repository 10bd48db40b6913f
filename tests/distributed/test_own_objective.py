"""An objective of one's own under ZeRO with GradCache: each part is called when and as often as the page says."""

import math
from typing import Any

import pytest

from tests.harness import run_ranks

CELLS = [
    ("zero3_fp32.json", 2),
    pytest.param("zero1_fp32.json", 2, marks=pytest.mark.nightly),
    pytest.param("zero2_bf16.json", 1, marks=pytest.mark.nightly),
    pytest.param("zero3_bf16.json", 2, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("ds", "pieces"), CELLS)
def test_each_part_is_called_when_it_should_be(ds: str, pieces: int) -> None:
    """4 samples a rank in 2 pieces; the third step is refused, so that nothing of it is committed."""
    ranks: list[list[dict[str, Any]]] = run_ranks(
        "tests.distributed.cases_own:counted", world_size=2, ds=ds, accumulation=pieces
    )
    size = 4 // pieces
    again = {f"per_sample {size} False": pieces, f"per_sample {size} True": pieces} if pieces > 1 else {}
    taken = {"observe": 1, "forward 4": 1} | (again or {"per_sample 4 True": 1})
    for rows in ranks:
        *steps, last = rows
        assert last["first"] == [0.10000000149011612] * 5  # fp32's 0.1, of bf16 engines too
        assert [row["applied"] for row in steps] == [True, True, False, True]
        for number, row in enumerate(steps):
            expected = taken if number == 2 else taken | {"commit": 1}  # one that is refused
            assert row["calls"] == expected, (number, row["calls"])
        centres = [row["centre"] for row in steps]
        assert centres[0] != centres[1] == centres[2] != centres[3]
        assert math.isnan(steps[2]["loss"]) and math.isfinite(steps[3]["loss"])
    assert [row["centre"] for row in ranks[0][:4]] == [row["centre"] for row in ranks[1][:4]]
    assert {"objectives.counting.centre", "objectives.counting.gain"} <= set(ranks[0][4]["state"])
