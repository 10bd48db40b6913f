"""Where did the launcher put this process? Pure readings of the variables that a launcher leaves: `discover(env)`.

Known: srun, torchrun, deepspeed, accelerate launch, mpirun (Open MPI, Hydra, MVAPICH), --procs, and no launcher at all.
"""

import contextlib
import random
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from amclip_ds.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_NAMES = {  # launcher -> its names for rank, size, local rank and local size
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun (Hydra)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "mpirun (MVAPICH)": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
}
FIRST_PORT, NUM_PORTS = 12000, 18000  # below the ephemeral range, so that no client socket takes one by chance


@dataclass(frozen=True)
class Placement:
    """Where a launcher put this process. `master_port` 0: any free port (this process is alone)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    master_addr: str
    master_port: int
    launcher: str
    note: str = ""
    """What a person should know about this start, if anything."""


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job that this process belongs to; `job` is empty outside one."""

    job: str = ""
    restart: int = 0
    """How often Slurm started the job again."""
    end: float | None = None
    """The end of its time, in seconds since the epoch, where Slurm's version gives it in the environment."""


def slurm_job(env: Mapping[str, str]) -> SlurmJob:
    """Reads the job from a batch script's, a shell's or a task's variables. Raises UserError."""
    if not env.get("SLURM_JOB_ID"):
        return SlurmJob()
    end = _integer(env, "SLURM_JOB_END_TIME", 0)
    return SlurmJob(env["SLURM_JOB_ID"], _integer(env, "SLURM_RESTART_COUNT", 0), float(end) if end else None)


def discover(env: Mapping[str, str]) -> Placement:
    """Reads a launcher's variables. Raises UserError, naming them, where they are half set or contradict each other."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_ranks(env)
    for launcher, names in MPI_NAMES.items():
        if names[0] in env and names[2] in env:
            return _from_mpi(env, launcher, names)
    if _in_slurm_step(env):
        return _from_slurm(env)
    return _alone(env)


def device_index(place: Placement, num_devices: int) -> int | None:
    """The CUDA device of this rank; None without GPUs. Raises UserError for more ranks than devices on a node."""
    if num_devices == 0:
        return None
    if num_devices == 1 and (place.launcher == "srun" or place.local_world_size == 1):
        return 0  # bound by `--gpus-per-task` or the like: every task sees one device, its own
    if place.local_rank < num_devices:
        return place.local_rank
    raise UserError(
        f"{place.launcher}: {place.local_world_size} ranks on node {place.node_rank} but {num_devices} visible"
        f" GPU(s) (CUDA_VISIBLE_DEVICES); start one rank per GPU"
    )


def expand_first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: 'gpu[03-07,9],login1' -> 'gpu03'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist.strip())
    if not first:
        raise UserError(f"SLURM node list {nodelist!r}: cannot be read")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group(0))


def expand_counts(tasks_per_node: str) -> list[int]:
    """Slurm's counts, node by node: '4(x2),3' -> [4, 4, 3]."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r}: cannot be read")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def slurm_port(env: Mapping[str, str]) -> int:
    """A port that every task of this Slurm step agrees on and that another job, step or restart does not share."""
    parts = [env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return FIRST_PORT + zlib.crc32("/".join(parts).encode()) % NUM_PORTS


def _from_ranks(env: Mapping[str, str]) -> Placement:
    """torchrun, deepspeed, accelerate launch and --procs all set torch's own variables; so do, in srun's tasks,
    pyxis and `export RANK=$SLURM_PROCID`."""
    missing = [name for name in NEEDED if not env.get(name)]
    if missing:
        found = ", ".join(f"{name}={env[name]}" for name in NEEDED if env.get(name))
        raise UserError(
            f"environment: {found} set but {', '.join(missing)} not; start with torchrun, srun or --procs,"
            f" which set all of them, or unset them to run alone"
        )
    rank, world_size, local_rank = (_integer(env, name) for name in NEEDED[:3])
    launcher = _rank_launcher(env)
    _check_range(rank, world_size, "RANK", "WORLD_SIZE")
    if launcher == "environment" and _in_slurm_step(env):
        task = _integer(env, "SLURM_PROCID")
        if task != rank and _integer(env, "SLURM_NTASKS") > 1:
            raise UserError(
                f"environment: RANK={rank} but SLURM_PROCID={task}; RANK and WORLD_SIZE were exported before"
                f" srun: unset them"
            )
        counts = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE") or "0")
        if task == rank and sum(counts) == world_size:  # srun's ranks under torch's names, which say nothing of nodes
            return _from_slurm(env)
    local_world_size = _integer(env, "LOCAL_WORLD_SIZE", _integer(env, "LOCAL_SIZE", 0))
    num_nodes = _integer(env, "GROUP_WORLD_SIZE", _integer(env, "CROSS_SIZE", 0))
    if not local_world_size and not num_nodes and world_size > 1:
        raise UserError(
            f"environment: WORLD_SIZE={world_size} but LOCAL_WORLD_SIZE not set, the number of ranks on a node: set it"
            f" too, or start with torchrun, srun or --procs"
        )
    if not local_world_size:
        local_world_size = world_size // (num_nodes or 1)
    _check_range(local_rank, local_world_size, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    num_nodes = num_nodes or -(-world_size // local_world_size)
    node_rank = _integer(env, "GROUP_RANK", _integer(env, "CROSS_RANK", rank // local_world_size))
    return Placement(
        rank,
        world_size,
        local_rank,
        local_world_size,
        node_rank,
        num_nodes,
        env["MASTER_ADDR"],
        _integer(env, "MASTER_PORT"),
        launcher,
    )


def _rank_launcher(env: Mapping[str, str]) -> str:
    if env.get("AMCLIP_LAUNCHER"):
        return env["AMCLIP_LAUNCHER"]
    if "ACCELERATE_MIXED_PRECISION" in env:
        return "accelerate"
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in env or "LOCAL_SIZE" in env else "environment"


def _from_mpi(env: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> Placement:
    missing = [name for name in names if name not in env]
    if missing:
        raise UserError(f"environment: {names[0]} set but {', '.join(missing)} not; start with mpirun or srun again")
    rank, world_size, local_rank, local_world_size = (_integer(env, name) for name in names)
    _check_range(rank, world_size, names[0], names[1])
    _check_range(local_rank, local_world_size, names[2], names[3])
    several_nodes = local_world_size < world_size
    if several_nodes and not env.get("MASTER_ADDR"):
        raise UserError(
            f"{launcher} over several nodes does not say where rank 0 is: add -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
            f" (-genv for Hydra), or start with srun"
        )
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMI_ID", "")
    port = FIRST_PORT + zlib.crc32(job.encode()) % NUM_PORTS
    return Placement(
        rank,
        world_size,
        local_rank,
        local_world_size,
        rank // local_world_size,
        -(-world_size // local_world_size),
        env.get("MASTER_ADDR") or "127.0.0.1",
        _integer(env, "MASTER_PORT", port),
        launcher,
    )


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """True in a task started by srun; a batch script and an salloc shell hold SLURM_* too, but are no tasks.

    Their step ids, where Slurm sets one, are reserved numbers near 2**32.
    """
    return "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and _integer(env, "SLURM_STEP_ID", 2**32) < 2**31


def _from_slurm(env: Mapping[str, str]) -> Placement:
    needed = ("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
    missing = [name for name in needed if not env.get(name)]
    if missing:
        raise UserError(
            f"environment: SLURM_PROCID set but {', '.join(missing)} not; start with srun, without --export=NONE"
        )
    rank, local_rank, node_rank = (_integer(env, f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NODEID"))
    counts = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"])
    world_size = sum(counts)  # of this step: SLURM_NTASKS may be the job's
    _check_range(rank, world_size, "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE")
    _check_range(node_rank, len(counts), "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
    _check_range(local_rank, counts[node_rank], "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    addr = env.get("MASTER_ADDR") or expand_first_host(env["SLURM_STEP_NODELIST"])
    return Placement(
        rank,
        world_size,
        local_rank,
        counts[node_rank],
        node_rank,
        len(counts),
        addr,
        _integer(env, "MASTER_PORT", slurm_port(env)),
        "srun",
    )


def _alone(env: Mapping[str, str]) -> Placement:
    note = ""
    if "ACCELERATE_USE_CPU" in env and "MASTER_PORT" in env:
        note = (
            "accelerate launch on the CPU starts one process whatever --num_processes says: running alone"
            " (for more: amclip train --procs N, or torchrun)"
        )
    elif _integer(env, "SLURM_NTASKS", 1) > 1:
        note = f"inside a Slurm job of {env['SLURM_NTASKS']} tasks but not started by srun: running alone"
    return Placement(0, 1, 0, 1, 0, 1, "127.0.0.1", 0, "alone", note)


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name}={text!r} is not a whole number") from None


def _check_range(value: int, size: int, name: str, size_name: str) -> None:
    if not 0 <= value < size:
        raise UserError(f"environment: {name}={value} is not in 0..{size - 1} ({size_name})")


def free_port() -> int:
    """A TCP port of this machine that is free now: drawn from those that no client socket is given by chance."""
    while True:
        port = random.SystemRandom().randrange(FIRST_PORT, FIRST_PORT + NUM_PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("0.0.0.0", port))
            return port
