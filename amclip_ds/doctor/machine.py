"""What this machine has: software, compiler, GPUs, disk, memory, limits, clock, launcher, ranks that meet."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from amclip_ds.doctor import FAIL, OK, WARN, Check, Finding
from amclip_ds.errors import UserError, in_one_line
from amclip_ds.sizes import GIB

GB = 1e9
CORE = ("torch", "torchvision", "deepspeed", "timm", "transformers", "numpy", "simplejpeg")  # shown with their versions
NATIVE = {"torchvision": "image operators", "simplejpeg": "JPEG decoding", "numpy": "arrays"}
FREE_GB = (2.0, 20.0)  # on the run's disk: below the first nothing can be saved, below the second not much
DISK_PROBE = 64 << 20
SLOW_DISK = 0.05  # GB/s
SHM_BYTES = 1 << 30  # NCCL's segments between the GPUs of a node
OPEN_FILES = (512, 4096)
SKEW_S = 5.0
DAY_S = 86400.0
COLLECTIVE_S = 90.0
COLLECTIVE = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if backend == "nccl":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
x = torch.full((1024,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
dist.all_reduce(x)
assert float(x.sum()) == 3 * 1024, float(x.sum())
dist.destroy_process_group()
"""
COMPILED = "int main() { return 0; }\n"


def checks(folder: Path) -> dict[str, Check]:
    """By name. folder: where runs are written, or the run."""
    return {
        "python": _python,
        "packages": _packages,
        "torch": _torch,
        "operators": _operators,
        "compiler": _compiler,
        "launcher": _launcher,
        "slurm": _slurm,
        "disk": partial(_disk, folder),
        "temporary": _temporary,
        "shared memory": _shared_memory,
        "limits": _limits,
        "memory": _memory,
        "clock": partial(_clock, folder),
        "collective": _collective,
    }


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    where = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    yield Finding("python", OK, f"{version} in {where} ({sys.prefix}), {platform.platform()}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    for text in importlib.metadata.requires("amclip_ds") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        yield Finding("packages", FAIL, "; ".join(wrong), "pip install -e . -c constraints.txt")
        return
    yield Finding("packages", OK, ", ".join(f"{name} {importlib.metadata.version(name)}" for name in CORE))


def _torch() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda
    has_driver = Path("/proc/driver/nvidia/version").exists()
    if torch.cuda.is_available():
        kinds = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gib = f"{kinds[0].total_memory / GIB:.0f} GiB" if kinds else ""
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        said = f"torch {torch.__version__}, CUDA {built}, {len(kinds)} x {kinds[0].name} ({gib}), NCCL {nccl}"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("gpu", WARN, f"{kinds[0].name} has no bf16", "engine.deepspeed=zero1_fp32.json (or 0, 2, 3)")
        yield Finding("torch", OK, said)
        yield _fp8(kinds[0].name)
    elif has_driver and built is None:
        fix = "install torch from its usual index, leave out -c constraints.txt"
        yield Finding(
            "torch", FAIL, f"torch {torch.__version__} is built without CUDA, and an NVIDIA driver is here", fix
        )
    elif has_driver:
        fix = "nvidia-smi shows the driver; a torch of the driver's CUDA, or CUDA_VISIBLE_DEVICES, or the job's --gpus"
        yield Finding("torch", FAIL, f"torch {torch.__version__} (CUDA {built}) sees no GPU, and a driver is here", fix)
    else:
        yield Finding("torch", OK, f"torch {torch.__version__}, no GPU here: runs are on the CPU")


def _fp8(gpu: str) -> Finding:
    """Whether engine.fp8 is possible."""
    import torch

    from amclip_ds.engine.fp8 import why_no_units

    if problem := why_no_units(torch.device("cuda", 0)):
        return Finding("fp8", OK, f"engine.fp8=none alone: {problem}")
    if importlib.util.find_spec("torchao") is None:
        return Finding("fp8", OK, f"{gpu} has it; engine.fp8 needs torchao too: pip install 'amclip_ds[fp8]'")
    return Finding(
        "fp8", OK, f"{gpu} has it, torchao {importlib.metadata.version('torchao')}: engine.fp8=teacher or all"
    )


def _operators() -> Iterator[Finding]:
    broken = []
    for name, what in NATIVE.items():
        if importlib.util.find_spec(name) is None:
            broken.append(f"{name} ({what}) is missing")
            continue
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=120)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            broken.append(f"{name} ({what}) does not load: {in_one_line(last, 160)}")
    if broken:
        yield Finding("operators", FAIL, "; ".join(broken), "pip install --force-reinstall the packages named")
    else:
        yield Finding("operators", OK, ", ".join(NATIVE))


def _compiler() -> Iterator[Finding]:
    from amclip_ds.ranks.runtime import compiler, extensions_dir

    place = next(path for path in (extensions_dir(), *extensions_dir().parents) if path.exists())
    if not os.access(place, os.W_OK):
        fix = "TORCH_EXTENSIONS_DIR=a folder of yours"
        yield Finding("compiler", WARN, f"compiled operators cannot be written to {extensions_dir()}", fix)

    found = compiler()
    needs = "only _offload files of ds_configs and engine.compile need it"
    if found is None:
        fix = "apt install g++, or module load gcc; or neither of them"
        yield Finding("compiler", WARN, f"no C++ compiler (CXX, c++, g++, clang++); {needs}", fix)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(COMPILED)
        done = subprocess.run([found, source, "-o", f"{folder}/probe"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        said = in_one_line(done.stderr, 160)
        yield Finding("compiler", WARN, f"{found} compiles nothing: {said}; {needs}", "another compiler in CXX")
    else:
        yield Finding("compiler", OK, found)


def _launcher() -> Iterator[Finding]:
    from amclip_ds.ranks.runtime import placement

    try:
        place = placement()
    except UserError as error:
        fix = "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT, or set them all (torchrun does)"
        yield Finding("launcher", FAIL, str(error), fix)
        return
    alone = "started alone" if place.world_size == 1 else f"rank {place.rank} of {place.world_size} by {place.launcher}"
    yield Finding("launcher", OK, alone)


def _slurm() -> Iterator[Finding]:
    from amclip_ds.ranks.runtime import current_job

    if shutil.which("sbatch") is None:
        yield Finding("slurm", OK, "no sbatch here: `amclip train` runs, `amclip submit` needs a login node")
        return
    done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=30)
    state = subprocess.run(["sinfo", "--noheader", "--format=%P %a %D"], capture_output=True, text=True, timeout=30)
    if state.returncode:
        said = in_one_line(state.stderr, 160)
        yield Finding("slurm", WARN, f"sbatch is here and sinfo fails: {said}", "a login node; the cluster's help desk")
        return
    job = current_job().job
    inside = f", in job {job}" if job else ""
    yield Finding("slurm", OK, f"{done.stdout.strip()}{inside}; partitions: {in_one_line(state.stdout, 160)}")


def _disk(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    if place.exists() and not place.is_dir():
        yield Finding("disk", FAIL, f"{place} is a file", "another run.out")
        return
    place = next(path for path in (place, *place.parents) if path.is_dir())
    if not os.access(place, os.W_OK):
        yield Finding("disk", FAIL, f"{place} cannot be written", "another run.out")
        return
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize / GB
    if free < FREE_GB[0]:
        fix = "another run.out, or `amclip checkpoints RUN prune`"
        yield Finding("disk", FAIL, f"{free:.2f} GB free at {place}", fix)
        return
    if space.f_files and space.f_favail < 10_000:
        yield Finding("disk", FAIL, f"{space.f_favail} files may still be made at {place}", "remove files, or a quota")
    rate = _write_rate(place)
    if rate is None:
        yield Finding("disk", FAIL, f"{place}: a file of {DISK_PROBE >> 20} MB cannot be written", "quota -s; df -h")
        return
    said = f"{free:.0f} GB free at {place}, written at {rate:.2f} GB/s with fsync"
    if free < FREE_GB[1]:
        yield Finding("disk", WARN, said, "checkpoint.keep_last=1; `amclip plan` says what checkpoints take")
    elif rate < SLOW_DISK:
        yield Finding("disk", WARN, said, "a faster disk for run.out (not the home folder)")
    else:
        yield Finding("disk", OK, said)


def _write_rate(folder: Path) -> float | None:
    content = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".amclip-doctor-") as file:
            began = time.perf_counter()
            for _ in range(DISK_PROBE >> 20):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return DISK_PROBE / GB / (time.perf_counter() - began)
    except OSError:
        return None


def _temporary() -> Iterator[Finding]:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Finding("temporary", FAIL, in_one_line(error, 160), "TMPDIR=a folder that can be written")
        return
    free = shutil.disk_usage(folder).free / GB
    status = OK if free > 1 else FAIL
    yield Finding("temporary", status, f"{free:.1f} GB free in {folder}", "" if status == OK else "TMPDIR=elsewhere")


def _shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    fix = "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm; NCCL_SHM_DISABLE=1 does without"
    if not place.is_dir():
        yield Finding("shared memory", WARN, "there is no /dev/shm", fix)
        return
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize
    if free < SHM_BYTES:
        said = f"{free / 2**20:.0f} MiB free in /dev/shm: NCCL needs it between GPUs of a node, the loader does not"
        yield Finding("shared memory", WARN, said, fix)
    else:
        yield Finding("shared memory", OK, f"{free / GIB:.1f} GiB free in /dev/shm")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = f"{soft} open files (at most {hard})"
    fix = f"ulimit -n {hard if hard > 0 else 65536}"
    if 0 <= soft < OPEN_FILES[0]:
        yield Finding("limits", FAIL, said, fix)
    elif 0 <= soft < OPEN_FILES[1] and soft != resource.RLIM_INFINITY:
        yield Finding("limits", WARN if soft < 1024 else OK, said, fix if soft < 1024 else "")
    else:
        yield Finding("limits", OK, said)
    address, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address != resource.RLIM_INFINITY:
        yield Finding("limits", WARN, f"address space limited to {address / GB:.1f} GB", "ulimit -v unlimited")


def _memory() -> Iterator[Finding]:
    from amclip_ds.processes import num_cores

    memory = psutil.virtual_memory()
    total, free = memory.total / GIB, memory.available / GIB
    cores, load = num_cores(), os.getloadavg()[0]
    said = f"{free:.1f} of {total:.1f} GiB free, {cores} cores, load {load:.1f}"
    if free < 2:
        yield Finding("memory", FAIL, said, "end other processes, or ask for more memory (--mem)")
    elif load > 2 * cores:
        yield Finding("memory", WARN, said, "other processes take the cores: timings and the loader suffer")
    else:
        yield Finding("memory", OK, said)


def _clock(folder: Path) -> Iterator[Finding]:
    now = time.time()
    newest = max(path.stat().st_mtime for path in Path(__file__).parents[1].glob("*.py"))
    shown = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    fix = "set it (chronyc makestep, or the administrator): requeues and time limits go by it"
    if now < newest - DAY_S:
        yield Finding("clock", FAIL, f"{shown}: this software is newer, by {(newest - now) / DAY_S:.0f} days", fix)
        return
    if now > newest + 15 * 365 * DAY_S:
        yield Finding("clock", FAIL, f"{shown}: years after this software was installed", fix)
        return
    skew = _skew(folder)
    if skew is not None and abs(skew) > SKEW_S:
        said = f"{shown}: the disk's server is {skew:+.0f} s apart"
        yield Finding("clock", WARN, said, "ntp on both: owners of runs and checkpoints are distinguished by time")
        return
    synced = "" if _is_synchronised() else ", not synchronised by the kernel's account"
    yield Finding("clock", OK, f"{shown}{synced}")


def _skew(folder: Path) -> float | None:
    """Seconds that the file server's clock is ahead of ours; None where nothing can be written."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()), None)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".amclip-doctor-") as file:
            file.write(b"x")
            file.flush()
            return os.fstat(file.fileno()).st_mtime - time.time()
    except OSError:
        return None


def _is_synchronised() -> bool:
    """What adjtimex says; True where it cannot be asked."""
    try:
        buffer = ctypes.create_string_buffer(512)
        return ctypes.CDLL(None).adjtimex(buffer) != 5
    except (OSError, AttributeError):
        return True


def _collective() -> Iterator[Finding]:
    import torch

    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "gloo"
    with tempfile.TemporaryDirectory(prefix="amclip-doctor-") as folder:
        words = [sys.executable, "-c", COLLECTIVE]
        began = time.perf_counter()
        ranks = [
            subprocess.Popen(
                [*words, str(rank), f"{folder}/store", backend],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            printed = [rank.communicate(timeout=COLLECTIVE_S)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            fix = "NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME=the interface"
            yield Finding("collective", FAIL, f"2 processes with {backend} did not meet in {COLLECTIVE_S:.0f} s", fix)
            return
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    seconds = time.perf_counter() - began
    failed = [text for rank, text in zip(ranks, printed) if rank.returncode]
    if failed:
        last = (failed[0].strip().splitlines() or ["no message"])[-1]
        fix = "NCCL_DEBUG=INFO says more; GLOO_SOCKET_IFNAME=lo where the host's name does not resolve"
        yield Finding("collective", FAIL, f"all-reduce of 2 processes with {backend}: {in_one_line(last, 200)}", fix)
    else:
        yield Finding("collective", OK, f"all-reduce of 2 processes with {backend}, {seconds:.1f} s with their start")
