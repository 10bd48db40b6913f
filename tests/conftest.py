"""What every test can ask for: the shared data folder, quiet and private caches, and the meaning of the marks."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads without work wait in a loop
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what pytest under nohup ignores, the programs it starts would ignore too
SHARED = Path(os.environ.get("AMCLIP_SHARED", ROOT.parent / "shared"))
LONGEST_FIRST = ("slurm", "e2e", "distributed", "parity")  # folders; the many short tests fill up what is left
TOGETHER = ("distributed", "parity")  # files there keep the results of launches for their next tests


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real pairs and the published code's numbers; skips, saying so, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED} (set AMCLIP_SHARED)")
    return SHARED


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What test processes may run side by side, in which order, and what is quick.

    What shares a launch or a fixture of its file stays together, and all that use the Slurm cluster.
    """
    for item in items:
        folder = folder_of(item)
        if folder == "slurm" or folder in TOGETHER or shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group("slurm" if folder == "slurm" else item.nodeid.partition("::")[0]))
        if folder == "unit" and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    order = {folder: place for place, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(folder_of(item), len(order)))


def folder_of(item: pytest.Item) -> str:
    """unit, distributed, ...: the folder of tests/ that a test is in."""
    return item.path.relative_to(ROOT / "tests").parts[0]


def shares_a_fixture(item: pytest.Item) -> bool:
    """Whether the test's own file makes something once for several tests."""
    info = getattr(item, "_fixtureinfo", None)
    file = item.nodeid.partition("::")[0]
    definitions = info.name2fixturedefs.values() if info else ()
    return any(found[-1].scope != "function" and found[-1].baseid == file for found in definitions)
