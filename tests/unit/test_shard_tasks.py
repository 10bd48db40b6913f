"""Slices of shards and the joining of their reports."""

from amclip_ds.shard_tasks import join, slice_of


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
