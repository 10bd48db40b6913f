"""Recomputing every n-th block of both towers changes the memory, not the numbers; heads and placements the same."""

import pytest

from tests.harness import run_ranks


@pytest.mark.parametrize("ds", [pytest.param("zero2_fp32.json", marks=pytest.mark.nightly), "zero3_fp32.json"])
def test_recomputed_blocks(ds: str) -> None:
    found = run_ranks("tests.distributed.cases_engine:checkpointed", world_size=2, timeout_s=600, ds=ds)[0]
    for every in (1, 2):
        assert found[every]["losses"] == pytest.approx(found[0]["losses"], rel=1e-6)
        assert found[every]["norms"] == pytest.approx(found[0]["norms"], rel=1e-5)
    assert found[0]["calls"] == [1] * 8
    assert found[1]["calls"] == [2] * 8
    assert found[2]["calls"] == [2, 1, 2, 1] * 2


def test_layer_norm_heads_and_the_placements_of_the_teacher() -> None:
    variants = [{"norm": "layer"}, {"placement": "replicated"}, {"placement": "sharded"}]
    one_rank = run_ranks(
        "tests.distributed.cases:train_all",
        world_size=1,
        timeout_s=600,
        ds="zero0_fp32.json",
        variants=[{"norm": "layer"}, {}],
    )[0]
    layer, replicated, sharded = run_ranks(
        "tests.distributed.cases:train_all", world_size=2, timeout_s=600, ds="zero3_fp32.json", variants=variants
    )[0]
    assert layer["losses"] == pytest.approx(one_rank[0]["losses"], rel=1e-5)
    assert replicated["losses"] == pytest.approx(one_rank[1]["losses"], rel=1e-5)
    assert sharded["losses"] == pytest.approx(replicated["losses"], rel=1e-6)
    assert layer["losses"] != pytest.approx(sharded["losses"], rel=1e-3)  # the twin: the norm reaches the heads
