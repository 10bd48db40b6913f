"""The loop's own decisions, without a run: whether a resume makes up an evaluation that a preemption cost; which
batches it holds."""

import contextlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amclip_ds import run as runs
from amclip_ds import train
from amclip_ds.doctor import learning
from amclip_ds.jsonl import MAX_READ, append_line, encode


@pytest.mark.parametrize("kind, is_missing", [(train.FAILED, False), (train.MADE_UP, False), ("damaged", True)])
def test_an_evaluation_is_made_up_however_many_incidents_there_are(
    kind: str, is_missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are ever held together: each row is read, and what was tried in vain is not tried again."""
    row = {"step": 7, "attempt": 0, "kind": "unreadable", "shard": "a.tar", "key": "1", "cause": "c" * (1 << 20)}
    with (tmp_path / "incidents.jsonl").open("wb") as file:
        for _ in range((MAX_READ >> 20) + 1):
            file.write(encode(row))
    append_line(tmp_path / "incidents.jsonl", {"step": 8, "attempt": 0, "kind": kind, "cause": "c"})
    monkeypatch.setattr(train, "specs_of", lambda config: ["set"])
    monkeypatch.setattr(train, "open_set", lambda spec, key: SimpleNamespace(name="set", task="retrieval"))
    said: list[str] = []
    run: Any = SimpleNamespace(
        folder=tmp_path,
        teacher=None,
        total_steps=16,
        state=SimpleNamespace(step=8),
        record=SimpleNamespace(say=said.append),
        config=SimpleNamespace(eval=SimpleNamespace(data="set", every_steps=4)),
    )
    assert train.evaluation_is_missing(run) == is_missing and not said
    [ending] = learning._ending(tmp_path)
    assert "65 x unreadable" in ending.found


class Made:
    """A batch on the device."""

    def to(self, device: str) -> "Made":
        return self


def test_a_batch_is_not_kept_beyond_its_step() -> None:
    """The first one neither: on a GPU that is memory for the whole run."""
    state = SimpleNamespace(step=0, cursor=None)
    run: Any = SimpleNamespace(
        state=state,
        total_steps=4,
        runtime=SimpleNamespace(device="cpu"),
        data=SimpleNamespace(batches=lambda cursor: iter(Made, None)),
        meter=SimpleNamespace(timed=iter),
        watchdog=SimpleNamespace(watched=lambda batches, step: batches),
        timeline=SimpleNamespace(during=lambda name: contextlib.nullcontext()),
    )
    seen = []
    for batch in runs.Run.batches(run):
        seen.append(weakref.ref(batch))
        state.step += 1
        assert [of() is not None for of in seen] == [False] * (len(seen) - 1) + [True]
    assert len(seen) == 4
