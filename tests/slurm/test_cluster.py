"""The fixture itself: two nodes with names and fake GPUs; a start that fails says why; the runtime under srun."""

import sys
from pathlib import Path

import pytest

from tests.slurm import cluster as cluster_module
from tests.slurm import runs
from tests.slurm.cluster import Cluster, ClusterError

RENDEZVOUS = """
import socket
from amclip_ds.ranks import runtime
started = runtime.start(120)
import torch
total = torch.tensor([10.0 ** started.rank])
torch.distributed.all_reduce(total)
print("SEEN", started.rank, started.local_rank, started.node_rank, started.num_nodes, started.launcher,
      socket.gethostname(), int(total.item()), flush=True)
runtime.stop(started)
"""


def test_nodes_have_names_of_their_own_and_gpus(cluster: Cluster) -> None:
    seen = cluster.client(
        "srun",
        "-N2",
        "--ntasks-per-node=2",
        "--gpus-per-task=1",
        "bash",
        "-c",
        'echo "$(hostname) $CUDA_VISIBLE_DEVICES"',
    )
    assert sorted(seen.splitlines()) == ["node1 0", "node1 1", "node2 0", "node2 1"]


def test_ranks_meet_under_srun_alone(cluster: Cluster, tmp_path: Path) -> None:
    """No MASTER_*, no torchrun: the node list and the job's id are enough. Uneven nodes too."""
    script = tmp_path / "meet.py"
    script.write_text(RENDEZVOUS)
    env = cluster.env | runs.base_environment()
    seen = cluster.client("srun", "-N2", "-n3", sys.executable, str(script), timeout_s=180, env=env)
    lines = sorted(line.split() for line in seen.splitlines() if line.startswith("SEEN"))
    assert [line[1] for line in lines] == ["0", "1", "2"]
    assert [line[6] for line in lines] == ["node1", "node1", "node2"] and {line[7] for line in lines} == {"111"}
    assert [line[2:6] for line in lines] == [["0", "0", "2", "srun"], ["1", "0", "2", "srun"], ["0", "1", "2", "srun"]]


def test_a_start_that_fails_shows_the_daemons_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "CONF", cluster_module.CONF.replace("select/cons_tres", "select/nonsense"))
    broken = Cluster()
    with pytest.raises(ClusterError, match="slurmctld.log\n(?s:.*)nonsense"), broken:
        pass
    assert not broken.base.exists()
