"""When weights come and go, and what follows from it: the teacher's place, and what a compiler takes."""

import pytest

from amclip_ds.engine.ds_config import (
    DS_CONFIGS,
    EngineConfig,
    compile_mode_of,
    fetches_weights,
    is_teacher_sharded,
    read_ds_config,
)
from amclip_ds.engine.zero3 import with_weights_in_place

STAGE_3 = [file.name for file in DS_CONFIGS.glob("zero3_*.json")]


@pytest.mark.parametrize("name", STAGE_3)
def test_weights_come_and_go_on_several_ranks_or_from_the_host(name: str) -> None:
    ds = read_ds_config(EngineConfig(name, allow_untested=True))
    assert fetches_weights(ds, 2)
    assert fetches_weights(ds, 1) == ("offload" in name)
    changed = with_weights_in_place(ds)
    assert {key for key in changed if changed[key] != ds.get(key)} == {"zero_optimization"}


def test_below_stage_3_they_stay() -> None:
    assert not any(fetches_weights(read_ds_config(EngineConfig(f"zero{stage}_fp32.json")), 8) for stage in (0, 1, 2))


@pytest.mark.parametrize(
    ("placement", "stage", "world_size", "is_sharded"),
    [
        ("auto", 2, 8, False),
        ("auto", 3, 8, True),
        ("auto", 3, 1, False),
        ("replicated", 3, 8, False),
        ("sharded", 3, 1, True),
    ],
)
def test_where_the_teacher_is(placement: str, stage: int, world_size: int, is_sharded: bool) -> None:
    assert is_teacher_sharded(placement, stage, world_size) == is_sharded


@pytest.mark.parametrize(
    ("asked", "device", "stage", "fetches", "mode"),
    [
        ("auto", "cuda", 0, False, "none"),
        ("auto", "cuda", 1, False, "tower"),
        ("auto", "cuda", 3, False, "tower"),
        ("auto", "cuda", 3, True, "block"),
        ("auto", "cpu", 3, True, "none"),
        ("tower", "cpu", 3, True, "block"),
        ("tower", "cpu", 3, False, "tower"),
        ("block", "cuda", 1, False, "block"),
        ("none", "cuda", 3, True, "none"),
    ],
)
def test_what_is_compiled(asked: str, device: str, stage: int, fetches: bool, mode: str) -> None:
    assert compile_mode_of(asked, stage, device, fetches) == mode
