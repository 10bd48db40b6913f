"""What a start, a save and a resume ask of the file system and of other ranks grows at most linearly."""

import pytest

from benchmarks import fleet


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_operations_grow_at_most_linearly(tmp_path_factory: pytest.TempPathFactory) -> None:
    """2, 4 and 8 ranks, two a node. A rank but the first does as much at any number; rank 0 a line's worth."""
    found = {size: fleet.count(size, tmp_path_factory.mktemp(f"fleet{size}")) for size in (2, 4, 8)}
    for one in fleet.table(found, at=1024):
        where, counts = f"{one['phase']} {one['kind']} on {one['on']}", one["counts"]
        if one["on"] == "another" and one["kind"] in ("looks", "opens", "changes"):
            assert abs(counts[8] - counts[4]) <= 2, where  # between 2 and 4 comes the first rank of a second node
        else:
            assert counts[8] - counts[4] <= 2.2 * (counts[4] - counts[2]) + 8, where
    assert max(rank["save"]["object_bytes"] for rank in found[8][1:]) < 0.1 * found[8][0]["save"]["object_bytes"]
