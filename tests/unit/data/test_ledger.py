"""The ledger: what is counted, when a run stops, that all ranks decide alike; the verdict on what a run waits for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amclip_ds.bottleneck import judge
from amclip_ds.data import ledger as ledger_module
from amclip_ds.data.batch import Batch
from amclip_ds.data.check import CheckConfig, check
from amclip_ds.data.ledger import LISTED, MIN_SKIPS_TO_STOP, Ledger, listed_in
from amclip_ds.data.photometric import Photometric
from amclip_ds.errors import RunStopped
from amclip_ds.jsonl import append_line, read_lines
from tests.unit.data.damaged import sample, samples, tar_of
from tests.unit.data.shards import open_data


def batch_of(size: int, *incidents: tuple[str, str], epoch: int = 0) -> Batch:
    """A batch with these (kind, shard) incidents."""
    rows = [
        {
            "kind": kind,
            "shard": shard,
            "key": "k",
            "cause": "c",
            "action": "replaced" if kind != "damaged" else "decoded",
        }
        for kind, shard in incidents
    ]
    empty = torch.empty(0)
    return Batch(
        empty,
        None,
        empty,
        Photometric(np.empty((0, 0, 12))),
        empty,
        empty,
        torch.arange(size),
        epoch,
        {},
        incidents=rows,
        read_bytes=10 * size,
    )


def test_counts_by_shard_and_kind() -> None:
    ledger = Ledger(0.5)
    ledger.account(batch_of(100, ("unreadable", "a.tar"), ("no caption", "b.tar"), ("damaged", "a.tar")))
    ledger.account(batch_of(100, ("unreadable", "a.tar")))
    interval = ledger.settle()
    assert (interval.seen, interval.skipped, interval.damaged, interval.read_bytes) == (200, 3, 1, 2000)
    assert interval.by_shard_and_kind == {("a.tar", "unreadable"): 2, ("b.tar", "no caption"): 1}
    assert ledger.settle().seen == 0, "what was settled is not counted again"
    account = "200 samples trained on, 3 skipped and replaced (unreadable 2, no caption 1), 1 damaged but decoded"
    assert account in ledger.summary()


def test_the_first_epoch_lists_every_incident_and_later_ones_a_few_of_a_shard_and_kind() -> None:
    """As many rows whether a run has two epochs or 32: later ones bring what was listed, and what is new in them."""
    bad = [("unreadable", "a.tar")] * 40 + [("damaged", "a.tar")] * 40
    ledger = Ledger(0.9)
    assert len(ledger.account(batch_of(100, *bad))) == 80
    for epoch in range(1, 32):
        assert not ledger.account(batch_of(100, *bad, epoch=epoch))
        ledger.settle()
    assert ledger.total.skipped == 32 * 40 and ledger.total.damaged == 32 * 40, "the account counts them all"
    new = [("no caption", "a.tar"), ("unreadable", "b.tar")] * 20
    listed = ledger.account(batch_of(100, *new, epoch=31))
    assert [row["shard"] for row in listed] == ["a.tar", "b.tar"] * LISTED
    deaths = batch_of(100, *[("worker_died", "")] * 40, epoch=31)
    assert ledger.account(deaths) == deaths.incidents, "what is of no shard is none of the samples"


def test_what_other_ranks_found_is_listed_by_them() -> None:
    """The counts are all ranks': two of them list as many rows of a later epoch as one, once they have settled."""
    bad = [("unreadable", "a.tar")] * LISTED
    ledger = Ledger(0.9, gather=lambda value: [value, value])
    assert len(ledger.account(batch_of(100, *bad[::2], epoch=1))) == LISTED // 2
    ledger.settle()
    assert not ledger.account(batch_of(100, *bad, epoch=1))


def test_a_resume_continues_from_what_is_listed(tmp_path: Path) -> None:
    """Else each attempt lists as many again, and the file grows with the preemptions."""
    bad = [("unreadable", "a.tar")] * 40
    for attempt in range(3):
        ledger = Ledger(0.9, listed=listed_in(tmp_path / "incidents.jsonl") if attempt else None)
        for row in ledger.account(batch_of(100, *bad, epoch=1)):
            append_line(tmp_path / "incidents.jsonl", row)
        assert len(read_lines(tmp_path / "incidents.jsonl")) == LISTED
        assert ledger.total.skipped == 0 and ledger.settle().skipped == 40, "the account is of what this attempt saw"


def test_too_many_skipped_stop_the_run_with_the_worst_shards_named() -> None:
    ledger = Ledger(0.01)
    ledger.account(batch_of(1000, *[("unreadable", "bad.tar")] * 18, ("no caption", "other.tar")))
    with pytest.raises(RunStopped, match=r"data\.max_skip_rate: 19 of 1019 .*bad\.tar 18 \(unreadable\), other\.tar 1"):
        ledger.settle()
    assert RunStopped.exit_code == 3


@pytest.mark.parametrize("skipped, stops", [(10, False), (11, True)])
def test_the_limit_is_exact(skipped: int, stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MIN_SKIPS_TO_STOP", 0)
    ledger = Ledger(0.01)
    ledger.account(batch_of(1000, *[("unreadable", "a.tar")] * skipped))
    if stops:
        pytest.raises(RunStopped, ledger.settle)
    else:
        ledger.settle()


def test_the_rate_is_of_the_samples_tried_and_never_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 places, 74 tries were bad, one or more for a place: 74 of 138, as half of the samples are bad."""
    monkeypatch.setattr(ledger_module, "MIN_SKIPS_TO_STOP", 0)
    half = batch_of(64, *[("unreadable", "a.tar")] * 74)
    ledger = Ledger(0.6)
    ledger.account(half)
    ledger.settle()
    ledger = Ledger(0.5)
    ledger.account(half)
    with pytest.raises(RunStopped, match="74 of 138 samples were unusable, above 50.0%"):
        ledger.settle()
    ledger = Ledger(0.999)
    ledger.account(batch_of(1, *[("unreadable", "a.tar")] * 900))
    ledger.settle()
    assert ledger.total.skipped < ledger.total.tried == 901


def test_half_the_samples_unusable_pass_a_limit_of_60_percent_in_check_and_training(tmp_path: Path) -> None:
    """One definition of the rate; limits of 0.4 refuse in both."""
    shard = tmp_path / "0.tar"
    bad = [file for number in range(200, 400) for file in sample(number, jpg=b"no image")]
    shard.write_bytes(tar_of([*samples(range(200)), *bad]))
    for limit, passes in ((0.6, True), (0.4, False)):
        assert check([str(shard)], CheckConfig(max_skip_rate=limit), 1).ok == passes
        data = open_data(shard, global_batch=64, teacher_size=None, num_units=0, context_length=77, max_skip_rate=limit)
        ledger, stream = Ledger(limit), data.batches()
        for _ in range(data.steps_per_epoch):
            ledger.account(next(stream))
        data.close()
        if passes:
            ledger.settle()
            assert 0.4 < ledger.total.skipped / ledger.total.tried < 0.6
        else:
            pytest.raises(RunStopped, ledger.settle)


def test_a_few_at_the_start_stop_nothing() -> None:
    ledger = Ledger(0.001)
    ledger.account(batch_of(20, *[("unreadable", "a.tar")] * MIN_SKIPS_TO_STOP))
    ledger.settle()


def test_a_shard_that_goes_bad_late_still_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long good times do not buy bad ones: what was read long ago is forgotten by the rate."""
    monkeypatch.setattr(ledger_module, "BLOCK", 1000)
    ledger = Ledger(0.05)
    for _ in range(100):
        ledger.account(batch_of(500))
        ledger.settle()
    ledger.account(batch_of(500, *[("unreadable", "late.tar")] * 200))
    pytest.raises(RunStopped, ledger.settle).match("late.tar 200")
    assert ledger.total.seen == 50_500


def test_all_ranks_see_the_sum_and_decide_alike() -> None:
    """One rank's bad shard stops them all; the twin without a gather would stop that rank alone, and hang the rest."""
    ledgers = [Ledger(0.01) for _ in range(4)]
    for rank, ledger in enumerate(ledgers):
        ledger.account(batch_of(500, *([("unreadable", "bad.tar")] * 30 if rank == 2 else [])))
    counts = [ledger._local for ledger in ledgers]

    def gather(value: Any) -> list[Any]:
        assert value in counts
        return counts

    for ledger in ledgers:
        ledger._gather = gather
        pytest.raises(RunStopped, ledger.settle).match("30 of 2030")


@pytest.mark.parametrize(
    "data, communication, bound",
    [
        (0.0, 0.0, "compute-bound"),
        (0.05, 0.1, "compute-bound"),
        (0.3, 0.0, "data-bound"),
        (0.2, 0.6, "data-bound"),
        (0.02, 0.5, "communication-bound"),
        (2.0, 2.0, "data-bound"),
    ],
)
def test_the_verdict_names_what_a_step_waits_for(data: float, communication: float, bound: str) -> None:
    verdict = judge(1.0, data, communication, workers=2, cores_per_rank=8)
    assert verdict.bound == bound and str(verdict).startswith(bound)
    assert verdict.data + verdict.communication + verdict.compute == pytest.approx(1)
    assert min(verdict.data, verdict.communication, verdict.compute) >= 0
    assert bool(verdict.advice) == (bound != "compute-bound")


def test_the_advice_fits_the_machine() -> None:
    assert "data.workers=4" in judge(1.0, 0.5, 0.0, workers=2, cores_per_rank=8).advice
    assert "data.workers=1" in judge(1.0, 0.5, 0.0, workers=0, cores_per_rank=2).advice
    assert "smaller images" in judge(1.0, 0.5, 0.0, workers=7, cores_per_rank=8).advice
