"""Which savings hold where: what depends on a rank's own samples must not decide how often ZeRO-3 gathers.

With the grouping at ZeRO-3 the runs of tests/e2e/test_add_your_own.py abort in their second step.
"""

import pytest

from amclip_ds.engine.ds_config import EngineConfig
from amclip_ds.engine.student import savings_of

CELLS = [(3, 2, False), (3, 1, True), (2, 8, True), (0, 4, True)]


@pytest.mark.parametrize(("stage", "world_size", "is_grouped"), CELLS)
def test_texts_are_grouped_by_length_where_no_rank_waits_for_it(stage: int, world_size: int, is_grouped: bool) -> None:
    found = savings_of(EngineConfig(), stage, world_size)
    assert found.texts_by_length == is_grouped
    assert found.last_block and found.patchify and found.one_write and found.teacher_inference
