"""The local cluster that the tests of this folder share: one a session, cleared between tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm import runs
from tests.slurm.cluster import Cluster, missing_binaries


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/slurm/" in item.path.as_posix():
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(3000))  # a loaded machine needs minutes for a start; hangs end before


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """Two nodes. Fails, with the daemons' logs, when they do not start; skips only where a program is absent."""
    missing = missing_binaries()
    if missing:
        pytest.skip(f"no {', '.join(missing)} (apt-get install --no-install-recommends slurm-wlm munge)")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with idle nodes and an empty queue."""
    yield session_cluster
    session_cluster.clear()


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (6 shards) and test/ of small synthetic scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    runs.make_data(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    """A job that ran through without a disturbance."""

    job: dict[str, str]
    log: str
    run: Path


@pytest.fixture(scope="session")
def undisturbed(session_cluster: Cluster, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """sbatch slurm/train.sbatch on 2 nodes x 2 tasks, left alone: what every disturbed run must end up equal to."""
    work = tmp_path_factory.mktemp("undisturbed")
    job_id = runs.submit_train(session_cluster, work, runs.tiny(synthetic, "run"), *runs.FOUR_TASKS)
    session_cluster.wait(job_id, "COMPLETED")
    return Finished(session_cluster.job(job_id), session_cluster.job_log(job_id), work / "run")
