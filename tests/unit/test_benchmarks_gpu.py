"""A row of benchmarks/gpu.py is of what its name says: switches that are not there, or change nothing, are refused; a
loader is timed at its own rate; losses beyond their limit fail."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import get_cpp_wrapper_config

from amclip_ds.data.views import planes
from amclip_ds.engine import compile as compiling
from amclip_ds.engine.compile import Compiled
from amclip_ds.model.config import TextConfig
from benchmarks import gpu
from tests.distributed.batches import made_batch

COMPILED = "aclip-vitb16,engine.compile=tower"


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    with torch._inductor.config.patch({}):
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")


def test_a_switch_is_put_on() -> None:
    recipe, batch, variations, words = gpu.parse_cell(f"{COMPILED},batch=8,inductor=triton.cudagraphs")
    assert (recipe, batch, variations, words) == ("aclip-vitb16", 8, ["all"], ["engine.compile=tower"])
    assert torch._inductor.config.triton.cudagraphs


@pytest.mark.usefixtures("cuda")
def test_graphs_are_left_in_the_c_plus_plus_wrapper() -> None:
    """Inductor leaves CUDA graphs out of it where it may split graphs."""
    gpu.parse_cell(f"{COMPILED},inductor=cpp_wrapper+triton.cudagraphs")
    assert torch._inductor.config.cpp_wrapper
    assert get_cpp_wrapper_config()["triton.cudagraphs"]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (f"{COMPILED},inductor=triton.cudagraph", "inductor=triton.cudagraph: torch .* has no such switch"),
        ("aclip-vitb16,inductor=triton.cudagraphs", "changes nothing without engine.compile=tower"),
        ("aclip-vitb16,engine.compile=none,inductor=triton.cudagraphs", "changes nothing"),
        (f"{COMPILED},inductor=cpp_wrapper", "CUDA_HOME is not set"),
    ],
)
def test_what_changes_nothing_is_refused(cell: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(SystemExit, match=said):
        gpu.parse_cell(cell)


def of_two_graphs(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def test_a_part_that_falls_back_is_in_the_row_and_fails_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)

    def measured(args: Any, cell: str) -> list[dict[str, Any]]:
        if cell != "eager":
            Compiled(of_two_graphs, "the part")(torch.ones(2))
        return [{"name": cell}]

    monkeypatch.setattr(gpu, "measure", measured)
    for cell in ("compiled", "eager"):
        gpu.run_cell(gpu.argparse.Namespace(cell=cell, out=tmp_path / "rows.jsonl"))
    compiled, eager = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert eager["not_compiled"] == [] and codes == [1, 0]
    assert compiled["not_compiled"][0].startswith("engine.compile: the part runs uncompiled")


def given(cells: list[str], data: Path | None = None, release: Path | None = None) -> Any:
    return gpu.argparse.Namespace(cells=cells, data=data, release=release)


def test_a_list_of_cells_leaves_out_what_has_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = gpu.expanded(given(["owed", "clip-tiny"], tmp_path, tmp_path))
    assert whole == [*gpu.SETS["owed"], "clip-tiny"]
    without = gpu.expanded(given(["owed"]))
    left = [cell for cell in whole if cell.startswith(("fed:", "release:"))]
    assert len(left) == 2 and without == [cell for cell in gpu.SETS["owed"] if cell not in left]
    printed = capsys.readouterr().out
    assert all(f"{cell}: left out, it needs --" in printed for cell in left)
    with pytest.raises(SystemExit, match="release:b16: it needs --release"):
        gpu.expanded(given(["release:b16"], data=tmp_path))


def test_the_release_without_its_timm_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--out", "rows.jsonl", "--cells", "release:b16", "--release", "checkout"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--release needs --timm FOLDER" in capsys.readouterr().err


def test_every_cell_of_a_list_is_understood() -> None:
    """Its settings are those of a recipe: a key that is not there would cost a call on the device."""
    for cell in {cell for cells in gpu.SETS.values() for cell in cells}:
        kind, _, rest = cell.rpartition(":")
        if kind in ("open_clip", "open_clip-compiled", "release"):
            assert rest in gpu.peers.SIZES
            continue
        recipe, batch, variations, words = gpu.parse_cell(rest, compiles=kind.startswith("exact"))
        config = gpu.steps.settings_of(recipe, words, batch, Path("scenes"))
        assert variations == ["all"] and config.batch.global_size == batch


@pytest.mark.parametrize(("compiled", "built"), [("open_clip:b16", False), ("open_clip-compiled:b16", True)])
def test_open_clip_is_one_model_a_process(compiled: str, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one beside it would count as its memory."""
    made: list[bool] = []
    monkeypatch.setattr(gpu, "BATCHES", {"vitb16": 2})
    monkeypatch.setattr(gpu.peers, "open_clip_step", lambda name, images, ids, compiled: made.append(compiled) or print)
    batch, works = gpu.build(gpu.argparse.Namespace(tokens=(8, 8)), compiled)
    assert batch == 2 and list(works) == [compiled] and made == [built]


def test_a_made_up_batch_has_the_loaders_memory() -> None:
    """A pixel's colours side by side: photometric changes and normalisation read them so."""
    views, crop = planes(torch.zeros(2, 4, 8, 8, 3)), planes(torch.zeros(4, 6, 6, 3))
    batch = made_batch(views, crop, torch.zeros(2, 4, 4), torch.zeros(4, 8, dtype=torch.long))
    batch = replace(batch, views_uint8=views.byte(), teacher_uint8=crop.byte())
    made = gpu.steps.made_up(batch, TextConfig(8, 1, 1), (4, 8), False, torch.device("cpu"))
    assert made.views_uint8.stride() == views.stride() and made.views_uint8.float().std() > 70
    assert made.teacher_uint8 is not None and made.teacher_uint8.stride() == crop.stride()


def test_what_was_made_ahead_is_taken_first() -> None:
    """14 workers with 4 chunks of 64 each: 14 batches of 256, and what the thread behind them holds."""
    batches = itertools.count()
    gpu.drain(batches, workers=14, prefetch=4, batch_size=256)
    assert next(batches) == 16
    batches = itertools.count()
    gpu.drain(batches, workers=2, prefetch=4, batch_size=32)
    assert next(batches) == 10


@pytest.mark.parametrize(("difference", "is_wrong"), [(0.9e-5, False), (1.1e-5, True), (math.nan, True)])
def test_losses_beyond_their_limit_fail_the_cell(
    difference: float, is_wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    row = {"name": "exact-fp32:x", "wrong": gpu.beyond(difference, gpu.FP32_LIMIT)}
    monkeypatch.setitem(gpu.KINDS, "exact-fp32", lambda args, cell: [row])
    gpu.run_cell(gpu.argparse.Namespace(cell="exact-fp32:x", out=tmp_path / "rows.jsonl"))
    assert codes == [int(is_wrong)] and ("at most 1.0e-05" in row["wrong"]) == is_wrong


@pytest.mark.parametrize("compiled", [[1.0, 1.5], [1.0001, 1.0]], ids=["later-losses-part", "the-first-parts"])
def test_in_fp32_the_first_loss_alone_is_held(compiled: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones hold what AdamW and the heads make of rounding."""

    class Engine:
        def __init__(self, recipe: str, words: list[str], *_: Any) -> None:
            losses = iter(compiled if "engine.compile=tower" in words else [1.0, 1.0])
            self.config = self.runtime = SimpleNamespace(device=torch.device("cpu"))
            self.batches: dict[bool, Any] = {}
            self.student = SimpleNamespace(step=None, module=torch.nn.Module(), flat=None)
            self.step = lambda variation: SimpleNamespace(loss=next(losses))

    monkeypatch.setattr(gpu.steps, "Ours", Engine)
    monkeypatch.setattr(gpu.steps, "first_batch", lambda *_: torch.ones(1))
    monkeypatch.setattr(gpu.steps, "reordered", lambda batch, order: batch)
    monkeypatch.setattr(gpu.steps, "made_scenes", lambda batch: contextlib.nullcontext("scenes"))
    [row] = gpu.measure_exact(gpu.argparse.Namespace(tokens=(8, 8)), "exact-fp32:aclip-tiny,batch=8")
    assert bool(row["wrong"]) == (compiled[0] != 1.0)


class Device:
    """A GPU's memory, and processes that build for 20 turns, and are measured for 2, one at a time."""

    def __init__(self, gib: float, out: Path) -> None:
        self.gib, self.out, self.processes = gib, out, list[Any]()

    def start(self, command: list[str], env: dict[str, str]) -> Any:
        cell = command[-1]
        here = SimpleNamespace(pid=len(self.processes), cell=cell, age=0, measured=0, returncode=None)
        here.poll = lambda: here.returncode
        assert not self.out.with_suffix(".go").exists(), "it would be measured beside others"
        self.processes.append(here)
        return here

    def running(self) -> list[Any]:
        return [here for here in self.processes if here.returncode is None]

    def held(self) -> float:
        """The measured peaks of docs/results/gpu-compiled.md while they build, and a GiB of the driver's."""
        return sum(1 + (peak_of(here.cell) if here.age < 20 else idle_of(here.cell)) for here in self.running())

    def pass_time(self, _: float) -> None:
        assert self.held() <= self.gib, f"out of memory: {[here.cell for here in self.running()]}"
        measured = False
        for here in self.running():
            here.age += 1
            if here.age >= 20 and here.cell.startswith("exact"):
                here.returncode = 0
            elif here.age == 20:
                gpu.built_file(self.out, here.pid).touch()
            elif here.age > 20 and not measured and self.out.with_suffix(".go").exists():
                measured = True
                here.measured += 1
                here.returncode = 0 if here.measured == 2 else None


def peak_of(cell: str) -> float:
    return 29.6 if cell.startswith("release") else 27.8 if "vitl16" in cell else 22.5


def idle_of(cell: str) -> float:
    return 10.0 if "vitl16" in cell else 4.0


@pytest.mark.parametrize("gib", [79.2, 139.0], ids=["H100", "H200"])
def test_cells_fit_on_the_device_while_others_hold_what_they_built(
    gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    device = Device(gib, out)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((gib - device.held()) * gpu.GIB, gib * gpu.GIB))
    monkeypatch.setattr(gpu.subprocess, "Popen", device.start)
    monkeypatch.setattr(gpu.time, "sleep", device.pass_time)
    words = ["--out", str(out), "--cells", "owed", "--data", "shards", "--release", "checkout", "--timm", "folder"]
    monkeypatch.setattr("sys.argv", ["gpu", *words])
    assert gpu.main() == 0
    assert [here.cell for here in device.processes] == gpu.SETS["owed"]
    assert "failed: none" in capsys.readouterr().out
