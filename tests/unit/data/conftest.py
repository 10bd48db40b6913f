"""The server of the loader's workers, started once for the tests of this folder."""

from multiprocessing import forkserver

import pytest

from amclip_ds.data.workers import start_worker_server


@pytest.fixture(scope="session", autouse=True)
def worker_server() -> None:
    """A run starts it first of all. Here another test may have started one that has imported nothing of what workers
    need: each of them would import torch again, which takes seconds."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    start_worker_server()
