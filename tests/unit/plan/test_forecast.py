"""What a run reports of its plan: a line, RUN/plan.json, and a refusal where the model cannot fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amclip_ds import config
from amclip_ds.errors import UserError
from amclip_ds.forecast import Forecast, device_of
from amclip_ds.plan.gpus import GPUS, Gpu
from amclip_ds.sizes import GIB


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


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA L40", 44.4, "NVIDIA L40"),  # nothing is known of it
        ("NVIDIA A10", 22.0, "a10"),
        ("NVIDIA A40", 44.4, "a40"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80"),
        ("NVIDIA A100 80GB PCIe", 79.1, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 NVL", 93.1, "h100-nvl"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GH200 480GB", 94.5, "gh200"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("AMD Instinct MI300X", 191.7, "mi300x"),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name: str, gib: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name=name, total_memory=int(gib * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    runtime: Any = SimpleNamespace(device=torch.device("cuda"))
    found = device_of(runtime)
    assert found is not None and found.name == kind and found.memory_gib == pytest.approx(gib)
    known = GPUS.get(kind)
    assert (found.peak_tflops, found.watts) == ((known.peak_tflops, known.watts) if known else (None, None))


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
