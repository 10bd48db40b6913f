"""The local cluster that the tests of this folder share: one a session, cleared between tests."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_binaries


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/slurm/" in item.path.as_posix():
            item.add_marker(pytest.mark.slurm)


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
