"""At ZeRO-3 a gather waits for what was written to the shards before: on a GPU it would read what is stale."""

import itertools

import pytest

from tests.harness import run_ranks

CASE = "tests.distributed.cases_engine:gathers"


def unordered(done: list[str]) -> int:
    """Gathers since whose engine's last write nothing has waited."""
    latest = itertools.accumulate(done, lambda before, now: now if now != "gather" else before)
    return sum(now == "gather" and before == "write" for now, before in zip(done, latest, strict=True))


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as-deepspeed-makes-them"])
def test_both_engines_gather_what_is_written(ordered: bool) -> None:
    for engines in run_ranks(CASE, world_size=2, ds="zero3_bf16.json", ordered=ordered):
        for done in engines.values():
            assert done.count("write") >= 3 and done.count("gather") >= 3
            assert (unordered(done) == 0) == ordered
