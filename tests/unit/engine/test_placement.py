"""What each launcher leaves in the environment, as captured from the real ones, and what we make of it."""

import pytest

from amclip_ds.errors import UserError
from amclip_ds.ranks.launcher_env import Placement, device_index, discover, expand_counts, expand_first_host, slurm_port

TORCHRUN = {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "34627",
    "RANK": "3",
    "ROLE_RANK": "3",
    "ROLE_WORLD_SIZE": "4",
    "WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "381625b6",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
DEEPSPEED = {
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "RANK": "1",
    "WORLD_SIZE": "2",
}
PROCS = {
    "AMCLIP_LAUNCHER": "procs",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "12345",
}
ACCELERATE_CPU = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1",
}
SRUN = {
    "CUDA_VISIBLE_DEVICES": "1",
    "SLURM_GTIDS": "2,3",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-1@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_torchrun() -> None:
    assert discover(TORCHRUN) == Placement(3, 4, 1, 2, 1, 2, "node1", 34627, "torchrun")


def test_accelerate_with_several_processes_is_torchrun_underneath() -> None:
    assert discover(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}).launcher == "accelerate"


def test_deepspeed() -> None:
    assert discover(DEEPSPEED) == Placement(1, 2, 1, 2, 0, 1, "127.0.0.1", 29500, "deepspeed")


def test_own_launcher() -> None:
    assert discover(PROCS) == Placement(1, 2, 1, 2, 0, 1, "127.0.0.1", 12345, "procs")


def test_accelerate_on_the_cpu_starts_one_process_and_is_reported() -> None:
    place = discover(ACCELERATE_CPU)
    assert (place.rank, place.world_size, place.launcher, place.master_port) == (0, 1, "alone", 0)
    assert "accelerate" in place.note and "--procs" in place.note


def test_nothing_set_is_alone() -> None:
    assert discover({}) == Placement(0, 1, 0, 1, 0, 1, "127.0.0.1", 0, "alone")


def test_srun() -> None:
    place = discover(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert (place.node_rank, place.num_nodes, place.master_addr, place.launcher) == (1, 2, "node1", "srun")
    assert discover(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}).master_port == 4000


def test_srun_on_uneven_nodes() -> None:
    uneven = SRUN | {
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_NODEID": "2",
        "SLURM_PROCID": "10",
        "SLURM_LOCALID": "2",
        "SLURM_STEP_NODELIST": "gpu[03-04],fat7",
    }
    place = discover(uneven)
    assert (place.world_size, place.local_world_size, place.num_nodes, place.master_addr) == (11, 3, 3, "gpu03")


def test_all_tasks_of_a_step_agree_on_a_port_that_other_jobs_do_not_share() -> None:
    assert discover(SRUN).master_port == discover(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).master_port
    others = [{"SLURM_JOB_ID": "8"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}]
    ports = {slurm_port(SRUN | other) for other in [{}, *others]}
    assert len(ports) == 4 and all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize("extra", [{}, {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NODELIST": "node1"}])
def test_batch_script_is_no_task(extra: dict[str, str]) -> None:
    place = discover(BATCH_SCRIPT | extra)
    assert place.world_size == 1 and "4 tasks" in place.note and "srun" in place.note


def test_torchrun_inside_srun_is_torchruns() -> None:
    assert discover(SRUN | TORCHRUN).launcher == "torchrun"


BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "9000"}


def test_ranks_exported_by_hand_from_srun_are_sruns_and_stale_ones_are_not() -> None:
    """As pyxis does, and many a script: torch's names of ranks, which say nothing of nodes. Slurm's do."""
    by_hand = SRUN | BY_HAND
    assert discover(by_hand) == Placement(3, 4, 1, 2, 1, 2, "node1", 9000, "srun")
    with pytest.raises(UserError, match="SLURM_PROCID=3"):
        discover(by_hand | {"RANK": "0"})
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0", "LOCAL_RANK": "0"}
    assert discover(by_hand | uneven) == Placement(3, 4, 0, 1, 1, 2, "node1", 9000, "srun")
    with_size = by_hand | uneven | {"LOCAL_WORLD_SIZE": "1"}  # from which alone every rank would be a node
    assert discover(with_size).num_nodes == 2


def test_ranks_exported_by_hand_whose_nodes_nobody_knows() -> None:
    other_size = SRUN | BY_HAND | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NTASKS": "8"}
    for env in (BY_HAND, other_size):
        with pytest.raises(UserError, match="LOCAL_WORLD_SIZE not set") as caught:
            discover(env)
        assert "\n" not in str(caught.value)
        assert discover(env | {"LOCAL_WORLD_SIZE": "2"}) == Placement(3, 4, 1, 2, 1, 2, "node1", 9000, "environment")
    alone = BY_HAND | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert discover(alone) == Placement(0, 1, 0, 1, 0, 1, "node1", 9000, "environment")


def test_mpirun() -> None:
    for env, launcher in (
        (OPEN_MPI, "mpirun (Open MPI)"),
        (HYDRA, "mpirun (Hydra)"),
        (SRUN | OPEN_MPI, "mpirun (Open MPI)"),
    ):
        place = discover(env)
        assert (place.rank, place.world_size, place.local_rank, place.launcher) == (1, 2, 1, launcher)
        assert place.master_addr == "127.0.0.1" and place.master_port > 1024


def test_mpirun_over_nodes_must_say_where_rank_0_is() -> None:
    several = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(UserError, match="-x MASTER_ADDR"):
        discover(several)
    place = discover(several | {"MASTER_ADDR": "n1", "MASTER_PORT": "4000", "OMPI_COMM_WORLD_RANK": "3"})
    assert (place.node_rank, place.num_nodes, place.master_addr, place.master_port) == (1, 2, "n1", 4000)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "n1"}, "RANK, LOCAL_RANK, MASTER_PORT not"),
        ({**TORCHRUN, "RANK": "four"}, "RANK='four'"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID not"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "'two'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1"}, "SLURM_PROCID=3"),
        (
            {name: value for name, value in OPEN_MPI.items() if "LOCAL_SIZE" not in name},
            "OMPI_COMM_WORLD_LOCAL_SIZE not",
        ),
    ],
)
def test_half_set_and_contradictory_environments_are_named(env: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        discover(env)
    assert "\n" not in str(caught.value)


def test_node_lists() -> None:
    assert expand_first_host("node[1-2]") == "node1"
    assert expand_first_host("gpu[03-07,9],login1") == "gpu03"
    assert expand_first_host("login1,gpu[1-2]") == "login1"
    assert expand_first_host("rack[1-2]n[01-04]") == "rack1n01"
    assert expand_first_host("gpu[7,9]-ib") == "gpu7-ib"
    assert expand_counts("4(x2),3") == [4, 4, 3] and expand_counts("1") == [1]


def test_device_of_a_rank() -> None:
    srun, torchrun = discover(SRUN), discover(TORCHRUN)
    assert device_index(srun, 0) is None
    assert device_index(srun, 8) == 1, "every task sees all GPUs: its own by local rank"
    assert device_index(srun, 1) == 0, "--gpus-per-task=1: every task sees one GPU, its own"
    assert device_index(torchrun, 2) == 1
    assert device_index(discover({}), 1) == 0
    assert device_index(discover(SRUN | BY_HAND), 1) == 0, "the same under torch's names"
    with pytest.raises(UserError, match="2 ranks on node 1 but 1 visible"):
        device_index(torchrun, 1)
