"""What a run reports of its plan: a line, RUN/plan.json, and a refusal where the model cannot fit."""

from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.errors import UserError
from amclip_ds.forecast import Forecast
from amclip_ds.plan.gpus import GPUS, Gpu


def test_a_line_before_the_first_step() -> None:
    line = Forecast(config.load("aclip-vitb16"), 8, GPUS["h100"]).line()
    assert line.startswith("plan: 1.27 GiB of model state and ") and "GiB at the peak" in line
    assert "samples/s at most" in line
    assert "samples/s" not in Forecast(config.load("aclip-tiny"), 2, None).line()


def test_what_may_run_out_is_said_and_what_cannot_fit_is_refused() -> None:
    settings = config.load("aclip-vitb16")
    assert "it may run out; a smaller batch.per_gpu" in Forecast(settings, 8, Gpu("x", 10.0, None, None)).line()
    with pytest.raises(UserError, match="the model state alone is 1.3 GiB on each of 8 ranks, and the GPU has 0.5"):
        Forecast(settings, 8, Gpu("x", 0.5, None, None))


PLUGIN = """
from amclip_ds.objectives.base import Objective
class Reads(Objective):
    features = frozenset({"cls"})
    def forward(self, features, targets, comm):
        return {"reads": features.cls.mean() * features.cls.sum().item()}
OBJECTIVES = {"reads": Reads}
"""


def test_an_objective_that_cannot_be_traced_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    settings = config.load("aclip-tiny", ["loss.reads.weight=1"], [str(tmp_path / "mine.py")])
    line = Forecast(settings, 1, None).line()
    assert line.startswith("plan: none: loss.reads: its cost cannot be traced without data")
