"""Shards over HTTP from a server that fails: repeated, counted, and the exact order of the local files."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from amclip_ds.data.batch import Batch
from amclip_ds.data.check import CheckConfig, check
from amclip_ds.shards import index, reader
from tests.unit.data.damaged import samples, tar_of
from tests.unit.data.faulty_server import FaultyServer, Where
from tests.unit.data.shards import open_data

SHARDS = {
    f"{n:05d}.tar": tar_of(samples(range(first, last))) for n, (first, last) in enumerate([(0, 9), (9, 20), (20, 25)])
}
FAULTS = ("500", "reset", "slow", "short", "cut", "silent")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(reader, "SILENCE_S", 0.5)


def epoch_of(train: str, index_folder: Path, workers: int = 0, batches: int = 6) -> list[Batch]:
    data = open_data(
        train,
        global_batch=4,
        context_length=77,
        index=str(index_folder),
        workers=workers,
        open_shards=2,
        shuffle_window=8,
    )
    stream = data.batches()
    made = [next(stream) for _ in range(batches)]
    data.close()
    return made


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        torch.equal(a.sample_ids, b.sample_ids)
        and torch.equal(a.views_uint8, b.views_uint8)
        and torch.equal(a.token_ids, b.token_ids)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    return folder


def remote_index(server: FaultyServer, tmp_path: Path) -> tuple[str, Path]:
    """The index of the shards by their URLs, made without faults."""
    train = server.url + "/{00000..00002}.tar"
    fault, server.fault = server.fault, lambda number, where: ""
    made = index.build_index([f"{server.url}/{name}" for name in SHARDS], tmp_path / "index", 1)
    server.fault, server._count = fault, 0
    assert len(made) == 25
    return train, tmp_path / "index"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_faults_are_repeated_and_counted_and_the_order_is_kept(workers: int, local: Path, tmp_path: Path) -> None:
    """Every second request goes wrong, each kind in turn; what comes out is what local files give."""
    with FaultyServer(SHARDS, lambda number, _: FAULTS[number // 2 % len(FAULTS)] if number % 2 else "") as server:
        train, folder = remote_index(server, tmp_path)
        remote = epoch_of(train, folder, workers, batches=12)
    assert equal(remote, epoch_of(str(local), tmp_path / "local", batches=12))
    if workers == 0:
        assert all(server.seen[fault] for fault in FAULTS), server.seen
    retried = [incident for batch in remote for incident in batch.incidents if incident["kind"] == "retried"]
    hurt = sum(count for fault, count in server.seen.items() if fault not in ("fine", "slow"))
    if workers == 0:  # a worker may have made more than was taken; a reset of a kept connection aiohttp repeats itself
        assert hurt - server.seen["reset"] <= len(retried) <= hurt, (Counter(i["cause"] for i in retried), server.seen)
    assert retried and all(incident["shard"].startswith(server.url) for incident in retried)


def test_the_comparison_sees_another_order(local: Path, tmp_path: Path) -> None:
    batches = epoch_of(str(local), tmp_path / "index")
    assert equal(batches, batches)
    assert not equal(batches, [batches[1], batches[0], *batches[2:]])


def test_a_range_that_never_comes_is_replaced_and_counted(local: Path, tmp_path: Path) -> None:
    """One sample's bytes always fail: it is replaced, with those that are read in one request with it; all others keep
    their place."""
    first = index.build_index([str(local / name) for name in SHARDS], tmp_path / "local", 1).sample(3)

    def fail(where: Where) -> str:
        name, start, stop = where
        return "500" if name == "00000.tar" and start <= first.image[0] < stop else ""

    with FaultyServer(SHARDS, lambda _, where: fail(where)) as server:
        train, folder = remote_index(server, tmp_path)
        remote = epoch_of(train, folder)
    here = epoch_of(str(local), tmp_path / "local")
    lost = [incident for batch in remote for incident in batch.incidents if incident["action"] == "replaced"]
    ids = [torch.cat([batch.sample_ids for batch in batches]).tolist() for batches in (remote, here)]
    changed = {theirs for ours, theirs in zip(*ids) if ours != theirs}
    of_its_shard = set(range(9))
    assert {3} <= changed <= of_its_shard and {incident["kind"] for incident in lost} == {"unreadable"}


def test_a_server_without_ranges(local: Path, tmp_path: Path) -> None:
    with FaultyServer(SHARDS, lambda number, where: "whole") as server:
        train, folder = remote_index(server, tmp_path)
        assert equal(epoch_of(train, folder), epoch_of(str(local), tmp_path / "local"))


def test_indexing_and_checking_repeat_downloads(local: Path, tmp_path: Path) -> None:
    """A shard cut within its download is fetched again; one that never comes is reported as unreadable."""
    urls = [f"{name}" for name in SHARDS]
    with FaultyServer(SHARDS, lambda number, _: ("cut", "reset", "500", "")[number % 4]) as server:
        urls = [f"{server.url}/{name}" for name in SHARDS]
        assert len(index.build_index(urls, tmp_path / "index", 1)) == 25
        report = check(urls, CheckConfig(), processes=1)
        assert report.ok and report.total("read") == 25
        server.fault = lambda number, _: "500"
        report = check(urls, CheckConfig(), processes=1)
    assert not report.ok and report.problems()["unreadable"] == 3


# What servers do to offsets


def read_one(server: FaultyServer) -> tuple[bytes | OSError, list[str]]:
    reported: list[str] = []
    request = (f"{server.url}/00000.tar", 512, 100)
    return reader.ShardReader(on_retry=lambda shard, cause: reported.append(cause)).read([request])[request], reported


@pytest.mark.parametrize(
    "fault, said",
    [
        ("gzip", "Content-Encoding: gzip, in which offsets are others"),
        ("other range", "asked for byte 512, the server sent 'bytes 513-"),
        ("redirect to file:///etc/passwd", "redirects to 'file:///etc/passwd', which is no http address"),
        ("redirect to ftp://127.0.0.1/x.tar", "which is no http address"),
        ("redirect to /00000.tar", "more than 10 redirects"),
    ],
)
def test_what_another_request_would_only_repeat_is_named_at_once(fault: str, said: str) -> None:
    with FaultyServer(SHARDS, lambda number, where: fault) as server:
        content, reported = read_one(server)
        report = check([f"{server.url}/00000.tar"], CheckConfig(), processes=1) if fault != "other range" else None
    assert isinstance(content, OSError) and said in str(content) and not reported
    if report is not None:
        assert said in report.as_json()["shards"][0]["problems"][0]["key"]


def test_redirects_of_http_are_followed() -> None:
    with (
        FaultyServer(SHARDS) as target,
        FaultyServer(SHARDS, lambda number, where: f"redirect to {target.url}/00000.tar") as server,
    ):
        content, reported = read_one(server)
    assert content == SHARDS["00000.tar"][512:612] and not reported


def test_https_is_not_left() -> None:
    from amclip_ds.shards import remote

    with pytest.raises(reader.Refused, match="redirects from https to 'http://host/a.tar"):
        remote._redirected("https://host/a.tar", "http://host/a.tar?token=x")
    assert remote._redirected("https://host/a/b.tar", "../c.tar") == "https://host/c.tar"
    assert remote._redirected("http://user:pass@host/b.tar", "https://other/c.tar") == "https://other/c.tar"


def test_a_server_that_ignores_ranges_is_named_once() -> None:
    with FaultyServer(SHARDS, lambda number, where: "whole") as server:
        reported: list[str] = []
        shards = reader.ShardReader(on_retry=lambda shard, cause: reported.append(cause))
        for offset in (0, 512, 1024):
            assert shards.read_many(f"{server.url}/00000.tar", [(offset, 10)]) == [
                SHARDS["00000.tar"][offset : offset + 10]
            ]
    assert reported == ["the server ignores ranges: it sends the whole shard for each read"]
