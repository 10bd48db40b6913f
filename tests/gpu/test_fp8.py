"""engine.fp8 where there are fp8 units: torchao's products themselves, compiled whole and not, at ZeRO 1 and 2."""

import math

import pytest
import torch

from amclip_ds.engine import fp8
from benchmarks.step import Ours, made_scenes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or fp8.why_no_units(torch.device("cuda", 0)) is not None,
        reason="no CUDA device with fp8 units on this machine",
    ),
]


@pytest.mark.parametrize(
    ("stage", "compiled", "batch"),
    [(1, "none", 32), (1, "tower", 32), (2, "tower", 32), (1, "none", 5), (1, "tower", 20)],
)
def test_losses_are_near_those_of_bf16(stage: int, compiled: str, batch: int) -> None:
    """5 and 20 samples: no weight's gradient is a product over a multiple of 16 tokens.
    Twin: engine.fp8=none from the same weights."""
    found = {}
    words = [f"engine.deepspeed=zero{stage}_bf16.json", f"engine.compile={compiled}"]
    with made_scenes(batch) as scenes:
        for mode in ("none", "teacher", "all"):
            ours = Ours("aclip-tiny", [*words, f"engine.fp8={mode}"], batch, (8, 20), scenes)
            found[mode] = [float(ours.step().loss) for _ in range(3)]
    for mode in ("teacher", "all"):
        assert all(map(math.isfinite, found[mode]))
        assert found[mode] == pytest.approx(found["none"], rel=0.05)
    assert found["all"] != found["none"]
