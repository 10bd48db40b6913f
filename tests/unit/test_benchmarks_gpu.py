"""A row of benchmarks/gpu.py is of what its name says: switches that are not there, or change nothing, are refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import get_cpp_wrapper_config

from amclip_ds.engine import compile as compiling
from amclip_ds.engine.compile import Compiled
from benchmarks import gpu

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
