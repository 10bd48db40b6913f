"""What the facts of all ranks mean, and how a slow node is distinguished from a slow partner."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from amclip_ds.ranks.bandwidth import name_outliers, tournament
from amclip_ds.ranks.preflight import Facts, code_hash, judge, read_probe, write_probe

FIT = [
    Facts(rank, f"node{1 + rank // 2}", "c0de", "c0f1", "torch 2", 100.0, 79_000_000_000, 80_000_000_000)
    for rank in range(6)
]


def test_fit_nodes_pass_without_a_word() -> None:
    verdict = judge(FIT)
    assert not verdict.mistakes and not verdict.faults and not verdict.warnings


def test_other_code_names_the_node_and_suggests_to_leave_it_out() -> None:
    (line,) = judge([replace(fact, code="0ld") if fact.host == "node2" else fact for fact in FIT]).mistakes
    assert "code of node2 (rank 2, 3) is 0ld, elsewhere c0de" in line and "--exclude=node2" in line


def test_other_config_is_a_mistake_of_the_rank() -> None:
    (line,) = judge([*FIT[:5], replace(FIT[5], config="else")]).mistakes
    assert "config of node3 (rank 5)" in line


def test_a_node_that_cannot_write_or_does_not_see_a_shard_is_named() -> None:
    """What the other nodes can is no mistake of the user's."""
    verdict = judge([*FIT[:4], replace(FIT[4], disk_error="cannot write in runs/x: No such file or directory"), FIT[5]])
    (line,) = verdict.faults
    assert "run.out: cannot write in runs/x: No such" in line and "--exclude=node3" in line and not verdict.mistakes
    verdict = judge([FIT[0], FIT[1], replace(FIT[2], shard_error="/data/7.tar cannot be read (missing)"), *FIT[3:]])
    (line,) = verdict.faults
    assert "/data/7.tar cannot be read (missing) on node2" in line and "--exclude=node2" in line
    assert not verdict.mistakes


def test_trouble_of_a_file_system_is_a_fault_on_every_node_too() -> None:
    facts = [
        replace(fact, disk_error="cannot write in runs/x: Disk quota exceeded", is_in_trouble=True) for fact in FIT
    ]
    verdict = judge(facts)
    assert len(verdict.faults) == 1 and "Disk quota" in verdict.faults[0] and not verdict.mistakes


def test_nobody_is_left_out_when_every_node_fails() -> None:
    (line,) = judge(
        [replace(fact, disk_error="cannot write in runs/x: Read-only file system") for fact in FIT]
    ).mistakes
    assert "exclude" not in line


def test_a_taken_gpu_and_a_wrong_clock_are_warnings() -> None:
    verdict = judge([*FIT[:4], replace(FIT[4], clock_s=160.0), replace(FIT[5], gpu_free=40_000_000_000, clock_s=160.0)])
    assert not verdict.mistakes
    busy, clock = verdict.warnings
    assert "rank 5 on node3: 40.0 of 80 GB" in busy and "clock of node3 is +60.0 s off" in clock


def test_everybody_meets_everybody_once_and_one_at_a_time() -> None:
    for count in (2, 3, 4, 7, 8):
        rounds = tournament(list(range(count)))
        met = [tuple(sorted(pair)) for partners in rounds for pair in partners.items()]
        assert sorted(met) == sorted([(a, b) for a in range(count) for b in range(a + 1, count)] * 2)
        assert all(partners[partners[player]] == player for partners in rounds for player in partners)


def test_a_slow_node_is_named_and_its_partners_are_not() -> None:
    nodes = ["n1", "n2", "n3", "n4"]
    rates = {(a, b): 10.0 for index, a in enumerate(nodes) for b in nodes[index + 1 :]}
    assert name_outliers(rates) == []
    slow = {pair: 2.0 if "n3" in pair else rate for pair, rate in rates.items()}
    (line,) = name_outliers(slow)
    assert line.startswith("n3 is slow with every node") and "--exclude=n3" in line
    (line,) = name_outliers({("n1", "n2"): 10.0, ("n1", "n3"): 2.0, ("n2", "n3"): 2.1})
    assert line.startswith("n3 ")
    (line,) = name_outliers(rates | {("n1", "n4"): 1.0})
    assert line.startswith("n1 and n4 are slow with each other")
    assert name_outliers({("n1", "n2"): 0.1}) == [], "of two nodes nobody can say which"


def test_probes_of_disk_shards_and_code(tmp_path: Path) -> None:
    assert write_probe(tmp_path, 0) == ("", False) and list(tmp_path.iterdir()) == []
    assert write_probe(tmp_path / "nowhere", 0) == (
        f"cannot write in {tmp_path}/nowhere: No such file or directory",
        False,
    )
    there = tmp_path / "0.tar"
    there.touch()
    assert read_probe([str(there), "https://host/1.tar", "pipe:cat 2.tar"]) == ("", False)
    assert read_probe([str(there), str(tmp_path / "1.tar")]) == (f"{tmp_path}/1.tar cannot be read (missing)", False)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EDQUOT])
def test_a_probe_knows_trouble_of_the_file_system(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: object, *words: object, **more: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing)
        patched.setattr(os, "fsync", failing)
        written, read = write_probe(tmp_path, 0), read_probe([str(tmp_path / "0.tar")])
    assert written == (f"cannot write in {tmp_path}: {os.strerror(number)}", True)
    assert read == (f"{tmp_path}/0.tar cannot be read ({os.strerror(number)})", True)


def test_another_code_has_another_hash(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "step.py").write_text("x = 1\n")
    hashes = [code_hash(tmp_path / "one"), code_hash(Path(shutil.copytree(tmp_path / "one", tmp_path / "two")))]
    (tmp_path / "two" / "step.py").write_text("x = 2\n")
    hashes.append(code_hash(tmp_path / "two"))
    (tmp_path / "one" / "step.py").rename(tmp_path / "one" / "steps.py")
    hashes.append(code_hash(tmp_path / "one"))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
