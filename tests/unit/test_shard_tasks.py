"""Slices of shards and the joining of their reports."""

import json
from pathlib import Path

import pytest

from amclip_ds.errors import UserError
from amclip_ds.shard_tasks import check, join, slice_of
from tests.unit.data.shards import write_shards


def test_slices_share_all_shards_out() -> None:
    shards = [f"{number}.tar" for number in range(7)]
    slices = [slice_of(shards, index, 3) for index in range(3)]
    assert sorted(sum(slices, [])) == shards and [len(part) for part in slices] == [3, 2, 2]


def test_a_bad_slice_makes_the_whole_bad() -> None:
    good = {"shards": [{"path": "b"}], "ok": True, "expected": 3, "read": 3, "skipped": 0, "lost": 0}
    bad = {"shards": [{"path": "a"}], "ok": False, "expected": 4, "read": 2, "skipped": 1, "lost": 1}
    joined = join([good, bad])
    assert not joined["ok"] and [shard["path"] for shard in joined["shards"]] == ["a", "b"]
    assert joined["expected"] == 7 == joined["read"] + joined["skipped"] + joined["lost"]
    assert join([good, good])["ok"]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_task_that_is_none_of_them_is_refused(index: int, tmp_path: Path) -> None:
    """Its shards would be another's, and others left out: the sum waits for ever."""
    write_shards(tmp_path / "shards", sizes=(4, 3, 2))
    with pytest.raises(UserError, match=f"INDEX: {index} is none of 2 tasks"):
        check(str(tmp_path / "shards"), tmp_path / "out", index, 2, [])


def test_the_last_task_to_end_joins_all_and_a_damaged_shard_decides(tmp_path: Path) -> None:
    shards, out = write_shards(tmp_path / "shards", sizes=(4, 3, 2)), tmp_path / "out"
    source = str(tmp_path / "shards")
    assert check(source, out, 1, 2, []) == 0 and not (out / "check.json").exists()
    assert check(source, out, 0, 2, []) == 0
    joined = json.loads((out / "check.json").read_text())
    assert joined["ok"] and joined["read"] == 9 and len(joined["shards"]) == 3
    Path(shards[2]).write_bytes(Path(shards[2]).read_bytes()[:1000])
    assert check(source, out, 0, 2, []) == 2 and not json.loads((out / "check.json").read_text())["ok"]
