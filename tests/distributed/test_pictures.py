"""Pictures of the masks move no number of a run: the same metrics and weights with them and without."""

from pathlib import Path

import pytest

from amclip_ds.jsonl import read_lines
from tests.distributed.test_checkpoint_run import SMALL, amclip, hashes, numbers, scenes

assert scenes  # the fixture


def train(folder: Path, data: Path, *more: str) -> Path:
    code, printed = amclip(f"data.train={data}", f"run.out={folder}", "run.steps=3", *SMALL, *more, ranks=2)
    assert code == 0, printed
    return folder


@pytest.mark.parametrize("stage, mask", [("zero2_bf16", "attentive"), ("zero1_fp32", "pgs")])
def test_a_picture_costs_no_bit(stage: str, mask: str, scenes: Path, tmp_path: Path) -> None:  # noqa: F811
    keys = [f"engine.deepspeed={stage}.json", f"mask.strategy={mask}"]
    drawn = train(tmp_path / "drawn", scenes, *keys, "log.pictures_every_steps=1", "log.tensorboard=true")
    plain = train(tmp_path / "plain", scenes, *keys, "log.pictures_every_steps=0")
    assert numbers(drawn) == numbers(plain)
    state = [
        {
            name: digest
            for name, digest in hashes(run / "checkpoints/step_00000003").items()
            if not name.startswith("rng/")
        }
        for run in (drawn, plain)
    ]
    assert state[0] == state[1] and len(state[0]) > 3
    rows = read_lines(drawn / "pictures" / "masks.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and (drawn / "pictures" / "masks.png").is_file()
    assert (rows[0]["scores"] is not None) == (mask == "attentive")
    assert not (plain / "pictures").exists()
