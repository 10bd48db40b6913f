"""What an engine cannot serve is refused on every rank, in one line with its fix; no compiler: a fallback."""

from pathlib import Path
from typing import Any

import pytest

from amclip_ds.engine.offload import OP
from tests.harness import run_ranks

CASE = "tests.distributed.cases_engine:refused"


@pytest.mark.parametrize(
    ("ds", "settings", "line"),
    [
        ("zero2_fp32.json", {"placement": "sharded"}, "2 teacher.placement: sharded needs ZeRO stage 3"),
        ("zero2_fp32_offload.json", {"optim": {"name": "lion"}}, "2 optim.name: lion cannot step in host memory"),
        ("zero3_bf16_hpz.json", {}, "2 engine.deepspeed: zero3_bf16_hpz.json is not tested here"),
    ],
    ids=["placement", "offload", "hpz"],
)
def test_refused(ds: str, settings: dict[str, object], line: str) -> None:
    assert all(said.startswith(line) for said in run_ranks(CASE, world_size=1, timeout_s=300, ds=ds, **settings))


def test_offload_without_its_op_is_refused(tmp_path: Path) -> None:
    """A machine without a C++ compiler: every rank hears the one line, whoever was to compile."""
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nonexistent/c++"}
    for said in run_ranks(CASE, timeout_s=300, env=env, ds="zero2_fp32_offload.json", optim={"name": "adamw"}):
        assert said.startswith(
            "2 engine.deepspeed: zero2_fp32_offload.json offloads the optimizer, which needs DeepSpeed's cpu_adam"
        )
        assert said.endswith("use zero2_fp32.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_offloaded_engines_agree(tmp_path: Path) -> None:
    """Nightly, since its first run compiles cpu_adam."""
    adamw = {"name": "adamw", "lr": 1e-3}
    expected = run_ranks("tests.distributed.cases:train", world_size=1, ds="zero0_fp32.json", optim=adamw)[0]["losses"]
    (tmp_path / OP).mkdir()
    (tmp_path / OP / "lock").touch()  # of a build that was killed: nobody waits for it
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    for ds in ("zero2_fp32_offload.json", "zero3_fp32_offload.json"):
        losses = run_ranks("tests.distributed.cases:train", timeout_s=600, env=env, ds=ds, optim=adamw)[0]["losses"]
        assert losses == pytest.approx(expected, rel=1e-4)


def agrees(found: dict[str, Any]) -> None:
    assert not found["said"]
    for own, plain in zip(found["compiled"], found["plain"], strict=True):
        assert own == pytest.approx(plain, rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("mode", ["block", "tower"])
def test_compiled_towers_agree(mode: str, stage: int) -> None:
    """By the compiler itself, which takes minutes."""
    case, ds = "tests.distributed.cases_engine:compiled", f"zero{stage}_fp32.json"
    found = run_ranks(case, timeout_s=900, ds=ds, mode=mode)[0]
    agrees(found)
    parts = ["plain", "compiled"] if mode == "block" else ["compiled", "plain"]
    assert found["towers"] == parts[:1] * 2 and found["blocks"] == [parts[1:]] * 2


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2])
def test_engines_in_fp8_have_the_names_and_nearly_the_numbers_of_bf16(stage: int) -> None:
    found = run_ranks("tests.distributed.cases_engine:in_fp8", timeout_s=300, ds=f"zero{stage}_bf16.json")[0]
    plain, converted = found["none"], found["all"]
    assert plain["layers"] == ["", ""]
    assert converted["layers"] == ["4 of 8 in the image tower, 6 of 12 in the text tower", "4 of 8 in the image tower"]
    assert converted["towers"] == plain["towers"] == ["compiled", "compiled"]
    assert converted["states"] == plain["states"] and converted["names"] == plain["names"]
    assert converted["rows"] != plain["rows"]
    for (loss, _), (theirs, _) in zip(converted["rows"], plain["rows"]):  # norms part: docs/results/fp8.md
        assert loss == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("ds", ["zero1_fp32.json", "zero3_fp32.json"])
def test_what_is_compiled_is_one_graph(ds: str) -> None:
    """Without the code generation: graphs, hooks and gradients are those of a compiled run. Whole towers; at ZeRO-3
    blocks, of the sharded teacher too."""
    case = "tests.distributed.cases_engine:compiled"
    found = run_ranks(case, timeout_s=300, ds=ds, mode="tower", backend="aot_eager")[0]
    agrees(found)
    parts = ["compiled", "plain"] if ds.startswith("zero1") else ["plain", "compiled"]
    assert found["towers"] == parts[:1] * 2 and found["blocks"] == [parts[1:]] * 2


@pytest.mark.nightly
@pytest.mark.parametrize("placement", ["auto", "sharded"])
def test_on_one_rank_zero_3_compiles_towers(placement: str) -> None:
    """Not those of a teacher in shards, whose weights come and go."""
    settings = {"ds": "zero3_fp32.json", "mode": "tower", "backend": "aot_eager", "placement": placement}
    found = run_ranks("tests.distributed.cases_engine:compiled", world_size=1, timeout_s=300, **settings)[0]
    agrees(found)
    parts = [("compiled", "plain"), ("plain", "compiled") if placement == "sharded" else ("compiled", "plain")]
    assert found["towers"] == [tower for tower, _ in parts] and found["blocks"] == [[block] for _, block in parts]


def test_compile_falls_back_and_says_so() -> None:
    case = "tests.distributed.cases_engine:compiled"
    for found in run_ranks(case, timeout_s=300, ds="zero3_fp32.json", mode="tower", backend="of_another_machine"):
        assert found["towers"] == ["plain"] * 2 and found["blocks"] == [["plain"]] * 2
        assert found["compiled"] == found["plain"] and "towers run uncompiled" in found["said"][0]


def test_training_compiles_nothing_and_waits_for_no_lock(tmp_path: Path) -> None:
    """The lock of a build that was killed: every run used to wait for it without a word."""
    for name in ("deepspeed_shm_comm", OP):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    before = sorted(tmp_path.rglob("*"))
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nonexistent/c++", "PATH": "/nonexistent"}
    found = run_ranks("tests.distributed.cases:train", timeout_s=120, env=env, ds="zero2_fp32.json", steps=1)
    assert found[0]["losses"] and sorted(tmp_path.rglob("*")) == before
