"""The preflight on real gloo ranks: silent on fit ones, and the same mistake on every rank for an unfit one."""

from pathlib import Path

import pytest

from tests.harness import RankFailed, run_ranks

CASE = "tests.distributed.cases_preflight:preflight_case"


@pytest.fixture
def shard(tmp_path: Path) -> str:
    (tmp_path / "0.tar").touch()
    return str(tmp_path / "0.tar")


def test_fit_ranks_are_measured(tmp_path: Path, shard: str) -> None:
    for result in run_ranks(CASE, world_size=2, folder=str(tmp_path), shard=shard):
        assert result["warnings"] == [] and result["rate"] > 0 and result["pairs"] == {}
        assert result["lines"][0].startswith("preflight: all-reduce")


def test_another_config_on_one_rank_stops_all(tmp_path: Path, shard: str) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(CASE, world_size=2, folder=str(tmp_path), shard=shard, nodes=True, other_config=True)
    assert str(caught.value).count("config of node1 (rank 1) is") == 2
    assert "--exclude=node1" in str(caught.value)


def test_an_unwritable_folder_and_an_unseen_shard_are_named(tmp_path: Path, shard: str) -> None:
    with pytest.raises(RankFailed, match="UserError: preflight: run.out: cannot write in .*nowhere"):
        run_ranks(CASE, world_size=2, folder=str(tmp_path / "nowhere"), shard=shard)
    with pytest.raises(RankFailed, match=r"1\.tar cannot be read \(missing\) on"):
        run_ranks(CASE, world_size=2, folder=str(tmp_path), shard=str(tmp_path / "1.tar"))


def test_a_slow_node_is_found_by_measurement(tmp_path: Path, shard: str) -> None:
    results = run_ranks(CASE, world_size=4, folder=str(tmp_path), shard=shard, nodes=True, slow=2)
    for result in results:
        assert len(result["pairs"]) == 6
        # A busy machine may slow another rank down as well: which lines that makes is test_bandwidth's matter.
        [culprit] = [line for line in result["warnings"] if line.startswith("node2 is slow with every node")]
        assert "--exclude=node2" in culprit
