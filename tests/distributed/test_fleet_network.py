"""Four nodes in network namespaces of their own on one bridge: one cut off in mid-save, one slowed to a tenth, one with
a clock that is five minutes off. The run is right, the node is named, and what was interrupted is resumed.

Each node has a host name, an address and a network; memory, processes and the file system are the one machine's, so
that a node that is cut off still writes its files. Needs root and iproute2, the clock libfaketime (AMCLIP_FAKETIME or
Debian's place); skipped, saying so, where one is missing.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from amclip_ds.data.synthetic import write_dataset
from amclip_ds.jsonl import read_lines
from tests.e2e.trainers import checkpoints, outcome, tiny, verdict

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]
NODES = 4
STEPS = 12
RATES = ("400mbit", "40mbit")  # of a usual node, of the slow one
FAKETIME = Path(os.environ.get("AMCLIP_FAKETIME", "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"))


class Network:
    """The bridge and the nodes, by the names of their namespaces."""

    def __init__(self) -> None:
        self.switch = f"amclip{os.getpid()}"
        self.nodes = [f"{self.switch}n{number}" for number in range(NODES)]

    def make(self) -> None:
        """Raises OSError or CalledProcessError where the machine does not allow it."""
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for number, node in enumerate(self.nodes):
            ip("netns", "add", node)
            ip("-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", self.switch)
            ip("-n", self.switch, "link", "set", f"port{number}", "master", "br0", "up")
            ip("-n", node, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "eth0", "up")
            ip("-n", node, "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in (*self.nodes, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def plug(self, node: int, state: str) -> None:
        """up, or down: the cable of a node."""
        ip("-n", self.switch, "link", "set", f"port{node}", state)

    def limit(self, node: int, rate: str) -> None:
        """How fast a node sends and receives."""
        for place, link in ((self.nodes[node], "eth0"), (self.switch, f"port{node}")):
            shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms"]
            subprocess.run(["tc", "-n", place, "qdisc", "replace", "dev", link, *shape], check=True)

    def unlimit(self) -> None:
        for node in range(NODES):
            for place, link in ((self.nodes[node], "eth0"), (self.switch, f"port{node}")):
                subprocess.run(["tc", "-n", place, "qdisc", "del", "dev", link, "root"], capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    found = Network()
    try:
        found.make()
    except (OSError, subprocess.CalledProcessError) as error:
        found.remove()
        pytest.skip(f"no network namespaces here (root and iproute2 are needed): {error}")
    yield found
    found.remove()


class Fleet:
    """One rank on each node, as srun starts them; clocks: node -> seconds that its clock is off."""

    def __init__(self, network: Network, run: Path, words: list[str], clocks: dict[int, int] | None = None) -> None:
        self.run = run
        self.logs = [run.parent / f"{run.name}-{time.monotonic_ns()}-node{number}.log" for number in range(NODES)]
        self.ranks = []
        for number, log in enumerate(self.logs):
            at = ["ip", "netns", "exec", network.nodes[number], "unshare", "--uts", "sh", "-c"]
            command = [*at, 'hostname "$0" && exec "$@"', f"node{number}", sys.executable, "-m", "amclip_ds", "train"]
            with log.open("w") as file:
                env = place_of(number) | clock((clocks or {}).get(number, 0))
                self.ranks.append(subprocess.Popen([*command, *words], stdout=file, stderr=file, env=env))

    def end(self, timeout_s: float = 900) -> list[int]:
        """The ranks' statuses."""
        deadline = time.monotonic() + timeout_s
        return [rank.wait(max(0.0, deadline - time.monotonic())) for rank in self.ranks]

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def printed(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def wait_for(self, what: str, ask: Callable[[], Any], timeout_s: float = 900) -> None:
        deadline = time.monotonic() + timeout_s
        while not ask():
            assert all(rank.poll() is None for rank in self.ranks), f"ended before {what}:\n{self.printed()}"
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.printed()}"
            time.sleep(0.005)


def place_of(rank: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(NODES),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29511",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
    }


def clock(seconds_off: int) -> dict[str, str]:
    """The clocks that a node's processes read; the times of files stay the file system's."""
    if not seconds_off:
        return {}
    return {"FAKETIME": f"{seconds_off:+d}s", "NO_FAKE_STAT": "1", "LD_PRELOAD": str(FAKETIME)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_dataset(folder, num_train=400, num_test=8, image_size=64, workers=1)
    return folder


def words_of(scenes: Path, run: Path, *more: str) -> list[str]:
    small = ["model.vision.depth=1", "model.text.depth=1", "checkpoint.every_steps=4"]
    limits = ["watchdog.step_timeout_s=60", "watchdog.phase_timeout_s=180"]
    return tiny(scenes, run, *small, *limits, f"run.steps={STEPS}", *more)


@pytest.fixture
def launch(network: Network, scenes: Path, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """launch("key=value", ..., clocks=...) -> the fleet at work on tmp_path/run."""
    fleets: list[Fleet] = []

    def start(*more: str, clocks: dict[int, int] | None = None) -> Fleet:
        run = tmp_path / "run"
        fleets.append(Fleet(network, run, words_of(scenes, run, *more), clocks))
        return fleets[-1]

    yield start
    for fleet in fleets:
        fleet.kill()


@pytest.fixture(scope="module")
def undisturbed(network: Network, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    fleet = Fleet(network, run, words_of(scenes, run))
    assert fleet.end() == [0] * NODES, fleet.printed()
    return outcome(run)


def test_a_node_cut_off_in_mid_save(
    network: Network, launch: Callable[..., Fleet], undisturbed: dict[str, Any]
) -> None:
    fleet = launch("checkpoint.asynchronous=false")
    folder = fleet.run / "checkpoints"
    fleet.wait_for("the second save", lambda: any(folder.glob(".tmp-step_*8")))
    network.plug(3, "down")
    cut = time.monotonic()
    assert 0 not in fleet.end(), fleet.printed()
    print(f"ended {time.monotonic() - cut:.0f} s after the cut")
    [row] = [row for row in read_lines(fleet.run / "incidents.jsonl") if row["kind"] == "hang"]
    assert row["rank"] == 3 and "rank 3 on node3" in row["cause"], row
    assert "does not reach the one where the ranks met" in row["cause"]
    assert not (fleet.run / "exit.json").exists(), "a hang is no verdict of the run's"
    assert set(checkpoints(fleet.run)) <= {4, 8}
    network.plug(3, "up")
    again = launch("checkpoint.asynchronous=false")
    assert again.end() == [0] * NODES, again.printed()
    assert outcome(again.run) == undisturbed


def test_a_node_slowed_to_a_tenth(network: Network, launch: Callable[..., Fleet], undisturbed: dict[str, Any]) -> None:
    for node in range(NODES):
        network.limit(node, RATES[node == 3])
    try:
        fleet = launch("watchdog.step_timeout_s=900")
        assert fleet.end(1800) == [0] * NODES, fleet.printed()
    finally:
        network.unlimit()
    assert "preflight: warning: node3 is slow with every node" in (fleet.run / "out.log").read_text()
    assert outcome(fleet.run) == undisturbed


@pytest.mark.skipif(not FAKETIME.exists(), reason="no libfaketime here (AMCLIP_FAKETIME names its library)")
def test_a_clock_five_minutes_off(launch: Callable[..., Fleet], undisturbed: dict[str, Any]) -> None:
    """First that of a node, then, in the attempt that resumes, that of the first, which writes the rows. Heartbeats are
    not tested: under libfaketime Python's waits with a limit do not end."""
    fleet = launch(clocks={3: 300})
    fleet.wait_for("a step", lambda: read_lines(fleet.run / "metrics.jsonl"))
    (fleet.run / "STOP").touch()
    assert fleet.end() == [0] * NODES, fleet.printed()
    assert verdict(fleet.run)["code"] == 75
    said = (fleet.run / "out.log").read_text().splitlines()
    warned = [line for line in said if "the clock of node3 is +" in line]
    assert warned and 295 < float(warned[0].partition("node3 is ")[2].split()[0]) < 305
    again = launch(clocks={0: -300})
    assert again.end() == [0] * NODES, again.printed()
    assert outcome(again.run) == undisturbed
