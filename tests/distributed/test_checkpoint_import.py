"""A DeepSpeed `save_checkpoint` folder becomes a checkpoint of ours: masters and moments bit for bit, at any stage."""

from pathlib import Path

import pytest

from amclip_ds import stored_checkpoints
from amclip_ds.config import BatchConfig, RunConfig, TrainConfig
from amclip_ds.engine.student import EngineConfig
from amclip_ds.errors import UserError
from amclip_ds.model.heads import HeadsConfig
from tests.distributed.cases_checkpoint import GLOBAL_BATCH, HEADS, odd_model
from tests.distributed.test_checkpoint_exact import launch
from tests.harness import run_ranks


@pytest.mark.parametrize("ds, world", [("zero2_bf16.json", 2), ("zero3_fp32.json", 3)])
def test_masters_and_moments_come_over(ds: str, world: int, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    [saved, *_] = run_ranks(
        "tests.distributed.cases_checkpoint:save_as_deepspeed", world, timeout_s=300, folder=str(theirs), ds=ds
    )
    config = TrainConfig(
        run=RunConfig(steps=40),
        model=odd_model(),
        heads=HeadsConfig(**HEADS),
        batch=BatchConfig(global_size=GLOBAL_BATCH),
        engine=EngineConfig(deepspeed=ds),
    )
    path, notes = stored_checkpoints.import_deepspeed(theirs, None, ours, config)
    assert path.name == "step_00000002" and any("teacher begins as a copy" in note for note in notes)
    dtype = ds.split("_")[1]
    there = launch(ours, 1, world_size=1, ds=f"zero1_{dtype}", resume=True, save=False)[0]
    kept = {key: value for key, value in saved.items() if not key.startswith(("ema ", "buffer teacher.", "counters"))}
    assert len(kept) > 200 and {key: there["loaded"][key] for key in kept} == kept
    for key, value in there["loaded"].items():
        if key.startswith("ema "):
            assert value == saved["master " + key.removeprefix("ema ")], key


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    run_ranks(
        "tests.distributed.cases_checkpoint:save_as_deepspeed",
        1,
        timeout_s=300,
        folder=str(tmp_path),
        ds="zero2_fp32.json",
    )
    other = TrainConfig(run=RunConfig(steps=40), model=odd_model(), heads=HeadsConfig(**(HEADS | {"output_dim": 5})))
    with pytest.raises(UserError, match=r"of another model: objectives\.byol"):
        stored_checkpoints.import_deepspeed(tmp_path, None, tmp_path / "ours", other)
    with pytest.raises(UserError, match="no ZeRO checkpoint"):
        stored_checkpoints.import_deepspeed(tmp_path, "nothing", tmp_path / "ours", other)
