"""Who am I among the ranks? `start()` joins the process group and returns a Runtime; `stop()` leaves it.

This is the one module that reads os.environ for a run (launcher_env.py says what it means). Nothing here seeds a random
generator or imports MPI.
"""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amclip_ds.errors import AmclipError, UserError, in_one_line
from amclip_ds.ranks.communication_time import time_engine_collectives
from amclip_ds.ranks.launcher_env import Placement, SlurmJob, device_index, discover, free_port, slurm_job

if TYPE_CHECKING:
    import torch


MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")  # which DeepSpeed and torch read
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
PORTS_TRIED = 3  # of those that we draw ourselves
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Program:
    """What `start` changes of the program that trains, as it was before: the next training, and the program itself,
    are to find it so again."""

    environment: Mapping[str, str | None]
    """MEETING's variables and CUBLAS; None: not set."""
    convolutions: str
    rnns: str
    """cuDNN's precisions of fp32: `allow_tf32` is both at once, and raises where the program has them apart."""
    deterministic: tuple[bool, bool] | None
    """Whether only kernels that repeat themselves were asked for, and whether others were only warned of; None where
    `start` leaves that as it is."""

    @classmethod
    def of_now(cls, deterministic: bool) -> "Program":
        import torch

        cudnn: Any = torch.backends.cudnn  # typed without its precisions
        asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(
            environment={name: os.environ.get(name) for name in (*MEETING, CUBLAS)},
            convolutions=cudnn.conv.fp32_precision,
            rnns=cudnn.rnn.fp32_precision,
            deterministic=asked if deterministic else None,
        )

    def restore(self) -> None:
        import torch

        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        cudnn: Any = torch.backends.cudnn
        cudnn.allow_tf32 = self.convolutions == self.rnns == "tf32"  # which torch holds against the two
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = self.convolutions, self.rnns
        if self.deterministic is not None:
            enabled, warn_only = self.deterministic
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@dataclass(frozen=True)
class Runtime:
    """This process in the running group. `device` is the one this rank computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_nodes: int
    node_rank: int
    device: "torch.device"
    launcher: str
    is_main: bool
    note: str = ""
    meeting: tuple[str, int] = ("", 0)
    """Host and port where the ranks met, on rank 0's node; it listens until the end."""
    program: Program | None = None
    """As it was before; None: there is nothing to put back."""


def start(timeout_s: float = 600.0, deterministic: bool = False) -> Runtime:
    """Joins the process group through DeepSpeed: NCCL on GPUs, gloo elsewhere. Collective: every rank must call.

    `timeout_s` bounds the meeting and every later collective. `deterministic`: only kernels that repeat bit for bit.
    Raises UserError for a wrong environment or a port in
    use, AmclipError when the other ranks cannot be reached.
    """
    import torch

    place = discover(os.environ)
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device_index(place, num_devices)
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    program = Program.of_now(deterministic)
    try:
        # DeepSpeed takes LOCAL_RANK for the index of the device, which is 0 for every task that was bound to one GPU.
        os.environ.update(
            RANK=str(place.rank),
            WORLD_SIZE=str(place.world_size),
            MASTER_ADDR=place.master_addr,
            LOCAL_RANK=str(place.local_rank if index is None else index),
        )
        # fp32 is fp32: matrix products are by default, convolutions would not be
        torch.backends.cudnn.allow_tf32 = False
        if deterministic:
            os.environ.setdefault(CUBLAS, ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
            torch.use_deterministic_algorithms(True)
        with _naming_the_rank_once(place.world_size):
            _meet(place, device, timeout_s)
    except BaseException:  # Ctrl-C in a notebook too: its next training must find no half of this one
        _leave(program)
        raise
    return Runtime(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        num_nodes=place.num_nodes,
        node_rank=place.node_rank,
        device=device,
        launcher=place.launcher,
        is_main=place.rank == 0,
        note=place.note,
        meeting=(place.master_addr, int(os.environ["MASTER_PORT"])),
        program=program,
    )


def keep_freed_memory() -> None:
    """Lets the allocator keep what a step frees for the next one. By default glibc returns every tensor of more than
    some hundred kB to the system, which clears its pages anew at each step: a tenth of a tiny step on a CPU
    (docs/results/cpu-step.md). Without glibc nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 1 << 30)


def stop(runtime: Runtime) -> None:
    """Leaves the process group, if there still is one; a program may train again, in a world of its own."""
    _leave(runtime.program)


def _leave(program: Program | None) -> None:
    import torch.distributed

    try:
        if torch.distributed.is_initialized():
            import deepspeed.comm.comm

            if deepspeed.comm.comm.cdb is None:  # cut short between torch's group and DeepSpeed's word of it
                torch.distributed.destroy_process_group()
            else:  # torch's alone would leave DeepSpeed its groups, which are no more
                deepspeed.comm.destroy_process_group()
    finally:
        if program is not None:
            program.restore()


_names_rank: Callable[..., None] | None = None
"""torch's hook for errors that nobody catches, which says of which rank one is; None: not set yet."""


@contextlib.contextmanager
def _naming_the_rank_once(world_size: int) -> Iterator[None]:
    """torch wraps sys.excepthook each time that ranks meet. Where there are several, once is right, for good: what
    ends a training, and its program, is shown after the ranks have left."""
    global _names_rank
    before = sys.excepthook
    try:
        yield
    finally:
        if world_size == 1 or before is _names_rank:
            sys.excepthook = before
        elif sys.excepthook is not before:
            _names_rank = sys.excepthook


def placement() -> Placement:
    """Where a launcher put this process, by its environment. Raises UserError for one that is half set."""
    return discover(os.environ)


def compiler() -> str | None:
    """The C++ compiler that a build here would use, if there is one."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)


def keep_compiled(run: Path) -> Path | None:
    """Lets torch.compile keep what it makes beside the run, so that a restart makes nothing again.

    In a folder of the user's own next to the run, never in it: what is there is executed, and a run's folder may
    come from a stranger. Each node has its own in there: torch and Triton replace files that another process reads,
    which a network file system answers with ESTALE, EBUSY or no file at all between nodes (pytorch#173679,
    triton#11512). Returns it, or None where the environment names another one, or where the folder belongs to somebody
    else or others may write to it: then torch keeps to its own place.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():  # torch sets its own
        return None
    folder = run.absolute().parent / f".amclip-compiled-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    own = folder / socket.gethostname()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)
    os.environ.setdefault("TRITON_CACHE_DIR", str(own / "triton"))
    return own


def current_job() -> SlurmJob:
    """The Slurm job of this process. Older versions of Slurm are asked for its end with squeue, for some seconds."""
    found = slurm_job(os.environ)
    if found.job and found.end is None:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            asked = ["squeue", "--noheader", "--jobs", found.job, "--format", "%e"]
            reported = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.split()
            found = dataclasses.replace(
                found, end=datetime.fromisoformat(reported[0]).timestamp() if reported else None
            )
    return found


def extensions_dir() -> Path:
    """Where compiled ops live: TORCH_EXTENSIONS_DIR, else a folder of this checkout or environment alone.

    torch's own default, in the home folder, is shared by all environments, which then undo each other's builds.
    """
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".cache" / "torch_extensions"
    return Path(sys.prefix) / "torch_extensions"


def build_environment(folder: str) -> dict[str, str]:
    """The variables for a compilation in `folder`: with this environment's ninja, whatever started us."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"TORCH_EXTENSIONS_DIR": folder, "PATH": path}


def take_the_cpu() -> None:
    """Says to DeepSpeed that it has no other device, which it would warn of."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _meet(place: Placement, device: "torch.device", timeout_s: float) -> None:
    """The meeting on the port that was given, or on a free one: another process may take it before we do, and then
    another one is drawn. Collective: every rank must call."""
    for attempt in range(PORTS_TRIED):
        port = place.master_port or free_port()
        try:
            return _init_process_group(place, port, device, timeout_s)
        except _PortInUse:
            if not place.master_port and attempt < PORTS_TRIED - 1:
                continue
            fix = "start again" if place.launcher == "--procs" else "set another one"
            raise UserError(f"MASTER_PORT: port {port} on {place.master_addr} is in use; {fix}") from None


_meetings: "list[torch.distributed.Store]" = []
"""Where the ranks met, for each training of this process. Kept: the first one's server serves the later ones."""


class _PortInUse(Exception):
    """Another process listens where the ranks were to meet."""


def _init_process_group(place: Placement, port: int, device: "torch.device", timeout_s: float) -> None:
    """The meeting itself; its failures as one line. Collective: every rank must call."""
    import logging

    if device.type == "cpu":
        take_the_cpu()
    import deepspeed
    import torch.distributed

    # Every op counts as impossible here, so that none is probed for or compiled: the one that would be, of shared
    # memory, serves `inference_all_reduce` alone. Ops that are asked for by name (offload.py) do not look here.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its own lines would drown a run's
    where = f"{place.master_addr}:{port}"
    os.environ["MASTER_PORT"] = str(port)
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    gpu = _identity(device)
    try:
        store, is_again = None, place.world_size > 1 and bool(_meetings)
        if is_again:  # what the earlier training's ranks wrote there is still to be read: under a name of its own
            store = torch.distributed.PrefixStore(f"training {len(_meetings)}", _meetings[0])
        elif place.world_size > 1 and gpu:
            # Kept until the others have met: its server is the meeting's, which would else begin anew on the port.
            store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
        if store is not None and gpu:
            check_gpus(store, place, gpu)
        if is_again:
            torch.distributed.init_process_group(
                backend,
                store=store,
                rank=place.rank,
                world_size=place.world_size,
                timeout=timeout,
                device_id=device if gpu else None,  # as DeepSpeed's first has it
            )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        del store
        if place.world_size > 1:
            _meetings.append(torch.distributed.distributed_c10d._get_default_store())
        time_engine_collectives()
    except (torch.distributed.DistError, RuntimeError, ValueError) as error:
        text = in_one_line(error, 300)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise _PortInUse from None
        raise AmclipError(
            f"rank {place.rank} on {socket.gethostname()} could not meet the others at {where}"
            f" (MASTER_ADDR, MASTER_PORT; {place.world_size} ranks, {timeout_s:.0f} s): {text}"
        ) from error


def _identity(device: "torch.device") -> str:
    """What a GPU is known by; empty for a CPU."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_gpus(store: "torch.distributed.Store", place: Placement, gpu: str) -> None:
    """That no two ranks have one GPU. Asked of the store where the ranks meet: NCCL's first word would be an error of
    its own, and it has it while it connects. Collective: every rank must call. Raises UserError, the same everywhere.
    """
    import torch.distributed

    host = socket.gethostname()
    first = int(store.compare_set(f"amclip: {host} {gpu}", "", str(place.rank)))
    if first != place.rank:
        one, other = sorted((first, place.rank))
        store.set(
            "amclip: shared",
            f"ranks {one} and {other} share one GPU of {host} ({gpu}): start one rank per GPU (--gpus-per-node, or"
            f" --gpus-per-task=1)",
        )
    _wait_for_all(store, place, "asked")
    if store.check(["amclip: shared"]):
        error = UserError(store.get("amclip: shared").decode())
        error.is_shared = True
        with contextlib.suppress(torch.distributed.DistError, RuntimeError):  # rank 0, the store's host, may be gone
            _wait_for_all(store, place, "answered")
        raise error


def _wait_for_all(store: "torch.distributed.Store", place: Placement, what: str) -> None:
    """Until every rank is here. Collective: every rank must call."""
    if store.add(f"amclip: {what}", 1) == place.world_size:
        store.set(f"amclip: all {what}", "")
    store.wait([f"amclip: all {what}"])
