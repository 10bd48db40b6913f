"""An engine in bf16 begins with the masters of one in fp32, bit for bit, and no tensor is drawn twice for them."""

from typing import Any

import pytest

from tests.harness import run_ranks


def first_masters(ds: str, **settings: Any) -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.cases_engine:first_masters", world_size=2, ds=ds, **settings)


@pytest.mark.parametrize("ds", ["zero1_bf16.json", "zero3_bf16.json"])
def test_bf16_masters_are_the_fp32_start(ds: str) -> None:
    for found in first_masters(ds):
        assert not found["other"] and found["masters"] > 20 and found["draws"] == 1


def test_rounded_ones_are_seen() -> None:
    for found in first_masters("zero1_bf16.json", rounded=True):
        assert len(found["other"]) > 10
