"""One NaN on one rank: every rank skips, nothing moves, the next step is as if nothing had been; then it stops."""

from typing import Any

import pytest

from tests.harness import run_ranks

FILES = [f"zero{stage}_fp32.json" for stage in range(4)] + [f"zero{stage}_bf16.json" for stage in (1, 2, 3)]
NIGHTLY = {"zero1_bf16.json", "zero3_bf16.json", "zero2_fp32.json"}


def check(results: list[dict[str, Any]], world_size: int) -> None:
    last = world_size - 1
    for rank, found in enumerate(results):
        assert found["applied"] == (False, False, True)
        assert found["counted"] == (1, 2)  # one skipped, two updates applied
        assert found["reason"] == f"non-finite loss, from rank {last}"
        assert found["gradient_left_it"] and found["loss_left_it"] and found["next_is_control"]
        assert found["guards"] == results[0]["guards"] and found["guards"]["skipped"] == 5
        kinds = [(incident[0], incident[2]["key"]) for incident in found["incidents"]]
        of_gradient = ("non_finite_gradient", ",".join(str(100 * rank + row) for row in range(4)))
        assert kinds[0] == of_gradient  # nobody can be distinguished: every rank names its samples
        of_loss = [("non_finite_loss", str(100 * last + 1))] * 4
        assert kinds[1:] == (of_loss if rank == last else [])
        assert found["stopped"].startswith(
            "RunStopped 3 guards.max_skipped: 3 steps in a row were skipped; the last: step 7"
        )
        assert f"sample ids rank {last}: {100 * last + 1};" in found["stopped"]


@pytest.mark.parametrize("ds", [pytest.param(ds, marks=pytest.mark.nightly) if ds in NIGHTLY else ds for ds in FILES])
def test_one_nan_on_one_rank(ds: str) -> None:
    check(run_ranks("tests.distributed.cases_engine:not_finite", world_size=2, timeout_s=600, ds=ds), 2)


@pytest.mark.nightly
@pytest.mark.parametrize("ds", FILES)
def test_one_nan_leaves_muons_momentum_alone(ds: str) -> None:
    check(run_ranks("tests.distributed.cases_engine:not_finite", timeout_s=600, ds=ds, optim="muon"), 2)


@pytest.mark.parametrize("ds", ["zero0_fp32.json", "zero2_fp32.json"])
def test_one_nan_in_an_accumulated_batch(ds: str) -> None:
    results = run_ranks("tests.distributed.cases_engine:not_finite", world_size=2, timeout_s=600, ds=ds, accumulation=2)
    check(results, 2)


def spike(ds: str, splits: int, **words: Any) -> dict[str, Any]:
    """What rank 0, where whole states are, saw of a spike's step; the decision is everybody's."""
    results = run_ranks(
        "tests.distributed.cases_guards:spike_refused", timeout_s=600, ds=ds, accumulation=splits, **words
    )
    decided = [{key: found[key] for key in ("applied", "reason", "counted", "committed")} for found in results]
    assert decided[0] == decided[1]
    return results[0]


CELLS = [(ds, splits) for ds in FILES for splits in (1, 2)]


@pytest.mark.parametrize(
    ("ds", "splits"),
    [cell if cell == ("zero1_fp32.json", 2) else pytest.param(*cell, marks=pytest.mark.nightly) for cell in CELLS],
)
def test_a_refused_gradient_is_never_applied(ds: str, splits: int) -> None:
    """A spike's gradient is finite: only the guards' word keeps it from the weights, moments and counters."""
    found = spike(ds, splits)
    assert not found["applied"] and found["counted"] == (1, 3) and found["committed"] == 0
    assert "leapt over" in found["reason"] and not found["norm_is_known"]
    assert found["nothing_moved"] and found["next_is_control"]


@pytest.mark.nightly
@pytest.mark.parametrize("ds", ["zero0_fp32.json", "zero2_bf16.json", "zero3_fp32.json"])
def test_a_refused_gradient_leaves_muon_alone(ds: str) -> None:
    found = spike(ds, 1, optim="muon")
    assert not found["applied"] and found["nothing_moved"] and found["next_is_control"]


@pytest.mark.nightly
@pytest.mark.parametrize(("ds", "splits"), CELLS)
def test_a_refused_gradient_that_nobody_poisons_is_applied(ds: str, splits: int) -> None:
    """The twin: the same steps, where the loss is not multiplied by the verdict."""
    found = spike(ds, splits, is_obeyed=False)
    assert found["applied"] and found["committed"] == 1
    assert not found["nothing_moved"] and not found["next_is_control"]


def test_without_the_check_stage_0_applies_a_nan() -> None:
    """The twin: DeepSpeed's own step at stage 0."""
    results = run_ranks("tests.distributed.test_guards:not_finite_unguarded", world_size=2, timeout_s=600)
    assert all(found["applied"][0] for found in results)
    assert not results[0]["next_is_control"], "whole states are compared on rank 0"


def not_finite_unguarded() -> dict[str, Any]:
    from amclip_ds.engine.student import StepOutcome, StudentEngine
    from tests.distributed import cases_engine

    def step(self: StudentEngine) -> StepOutcome:
        self.engine.step()
        return StepOutcome(True, 0.0)

    StudentEngine._step_at_stage_0 = step  # type: ignore[method-assign]
    return cases_engine.not_finite("zero0_fp32.json")
