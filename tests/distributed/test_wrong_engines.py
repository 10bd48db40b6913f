"""What an engine cannot serve is refused on every rank, in one line with its mend; no compiler: a fallback."""

import pytest

from tests.harness import run_ranks

CASE = "tests.distributed.cases_engine:refused"


@pytest.mark.parametrize(
    ("ds", "settings", "line"),
    [
        ("zero2_fp32.json", {"optim": {"name": "muon"}},
         "2 optim.name: muon looks at whole tensors, and zero2_fp32.json is ZeRO stage 2"),
        ("zero2_fp32.json", {"placement": "sharded"}, "2 teacher.placement: sharded needs ZeRO stage 3"),
        ("zero2_fp32_offload.json", {"optim": {"name": "lion"}}, "2 optim.name: lion cannot step in host memory"),
        ("zero3_bf16_hpz.json", {}, "2 engine.deepspeed: zero3_bf16_hpz.json is not tested here"),
    ],
    ids=["muon", "placement", "offload", "hpz"],
)  # fmt: skip
def test_refused(ds: str, settings: dict[str, object], line: str) -> None:
    assert all(said.startswith(line) for said in run_ranks(CASE, world_size=1, timeout_s=300, ds=ds, **settings))


@pytest.mark.nightly
def test_offload_without_its_op_is_refused(tmp_path: object) -> None:
    """A machine without a C++ compiler."""
    said = run_ranks("tests.distributed.test_wrong_engines:refused_without_compiler", world_size=1, timeout_s=600,
                     folder=str(tmp_path))[0]  # fmt: skip
    assert said.startswith(
        "2 engine.deepspeed: zero2_fp32_offload.json offloads the optimizer, which needs DeepSpeed's cpu_adam"
    )
    assert said.endswith("use zero2_fp32.json")


def refused_without_compiler(folder: str) -> str:
    """The communication op stays built; only cpu_adam is looked for elsewhere."""
    import os

    from amclip_ds.engine import runtime
    from tests.distributed import cases_engine

    start = runtime.start

    def start_then_hide() -> runtime.Runtime:
        started = start()
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        os.environ["CXX"] = (
            "/nonexistent/c++"  # not before: another compiler would have the communication op built anew
        )
        return started

    runtime.start = start_then_hide  # type: ignore[assignment]
    return cases_engine.refused("zero2_fp32_offload.json", optim={"name": "adamw"})


@pytest.mark.nightly
def test_offloaded_engines_agree() -> None:
    """Nightly, since its first run compiles cpu_adam."""
    adamw = {"name": "adamw", "lr": 1e-3}
    expected = run_ranks("tests.distributed.cases:train", world_size=1, ds="zero0_fp32.json", optim=adamw)[0]["losses"]
    for ds in ("zero2_fp32_offload.json", "zero3_fp32_offload.json"):
        losses = run_ranks("tests.distributed.cases:train", timeout_s=600, ds=ds, optim=adamw)[0]["losses"]
        assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.nightly
def test_compiled_blocks_agree() -> None:
    found = run_ranks("tests.distributed.cases_engine:compiled", timeout_s=900, ds="zero2_fp32.json")[0]
    assert found["is_compiled"] and not found["said"]
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-5)


def test_compile_falls_back_and_says_so() -> None:
    for found in run_ranks("tests.distributed.cases_engine:compiled", timeout_s=300, ds="zero3_fp32.json"):
        assert not found["is_compiled"] and found["compiled"] == found["plain"]
        assert "blocks run uncompiled" in found["said"][0]
