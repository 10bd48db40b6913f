"""`amclip train --procs N`: starts the ranks of one machine, forwards signals once, ends them together.

On a machine without a GPU the ranks are forks of this process, which imports for all of them, once. Lost ones are
started again where that was asked for. The ranks die with this process (PR_SET_PDEATHSIG). Rank 0 writes to the
terminal; of another rank that fails first the end of its output is shown. The verdict is RUN/exit.json, which rank 0
writes after its last commit; the processes' own statuses count only where there is none.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from amclip_ds import run_files
from amclip_ds.errors import MISTAKE, STOPPED_ITSELF, TO_REQUEUE, UserError
from amclip_ds.ranks.launcher_env import discover, free_port
from amclip_ds.record import read_verdict
from amclip_ds.signals import STOPPING, heeded

PR_SET_PDEATHSIG = 1
GRACE_S = 5.0  # what the others get to notice by themselves that a rank is gone
GRACE_WHEN_STOPPING_S = 30.0  # the same while they may be committing a checkpoint
TAIL_BYTES = 4000
AGREED = (MISTAKE, STOPPED_ITSELF, TO_REQUEUE)  # codes with which all ranks leave alike


GPU_DEVICES = ("nvidiactl", "kfd", "dxg")  # below /dev: NVIDIA's, AMD's, Windows'


class Fork:
    """A child that os.fork made, with what is needed here of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its status once it has ended, a signal as a negative number."""
        if self.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


Process = subprocess.Popen | Fork
Start = Callable[[dict[str, str], Path | None], Process | None]
"""(variables, where its output goes or None for here) -> a rank's process; None in the rank itself."""


@dataclass
class _Ranks:
    """The children, and what was asked of them."""

    running: dict[int, Process] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    """Rank -> status, in the order of their ends."""
    asked_at: float | None = None
    """When a signal was forwarded (monotonic seconds)."""


def run_ranks(
    argv: list[str],
    procs: int,
    run_folder: str | Path | None = None,
    *,
    forced_exit_s: float = 600.0,
    env: dict[str, str] | None = None,
    listens: bool = False,
    heard: list[int] | None = None,
) -> int:
    """Runs `argv` as `procs` ranks of this machine. Returns the exit code: RUN/exit.json's, else the first failure's.

    forced_exit_s: after a signal the ranks have so long to save and leave; then they are killed.
    env: variables added to the ranks' environment.
    listens: the ranks handle the signals (`resilience.preemption.listen`); until they do, signals are kept for them.
    heard: gets the signals that arrived, for a caller with more to do: ranks at their end return 0 all the same.
    """

    def start(variables: dict[str, str], output: Path | None) -> Process:
        return _start(argv, variables | (env or {}), output, listens)

    code = _run(start, procs, run_folder, forced_exit_s, heard if heard is not None else [])
    assert code is not None
    return code


def hold_signals_back() -> None:
    """Keeps what asks a run to stop for the ranks that train_ranks will start. Until then Ctrl-C ends this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGINT})


def train_ranks(
    argv: list[str],
    procs: int,
    run_folder: str | Path,
    *,
    forced_exit_s: float,
    max_restarts: int = 0,
    import_ahead: Callable[[], None] | None = None,
) -> int | None:
    """The ranks of a training, which listen to signals. Returns the exit code as run_ranks does.

    argv: what a rank runs. max_restarts: how often all are started again, from the newest checkpoint, where they end
    without a verdict: killed, or by a crash.
    import_ahead: imports what a rank needs. The ranks are then forks of this process instead, and in each of them this
    function returns None. Not on a machine with a GPU: a process that has talked to one must not fork.
    """
    if import_ahead is not None:
        os.environ.setdefault("OMP_NUM_THREADS", _threads(procs))
        import_ahead()
    heard: list[int] = []
    restarts = 0
    while True:
        start = partial(_start, argv, listens=True) if import_ahead is None else _fork
        code = _run(start, procs, run_folder, forced_exit_s, heard)
        is_lost = code not in (None, 0, *AGREED) and not Path(run_folder, run_files.VERDICT).exists()
        if not is_lost or heard or restarts == max_restarts:
            return code
        restarts += 1
        print(
            f"--- starting the ranks again from the newest checkpoint, restart {restarts} of {max_restarts}",
            file=sys.stderr,
            flush=True,
        )


def has_gpu() -> bool:
    """Whether this machine shows one, without asking a driver."""
    return any(Path("/dev", name).exists() for name in GPU_DEVICES)


def _run(start: Start, procs: int, run_folder: str | Path | None, forced_exit_s: float, heard: list[int]) -> int | None:
    """Starts the ranks and follows them to their end. Returns the exit code; in a rank that is a fork, None."""
    launcher = os.getpid()
    verdict_file = Path(run_folder, run_files.VERDICT) if run_folder is not None else None
    before = _identity(verdict_file)
    port = free_port()
    ranks = _Ranks()
    logs = tempfile.mkdtemp(prefix="amclip-")
    outputs = [Path(logs, f"rank{rank}") for rank in range(procs)]
    with _forwarding(ranks, heard):
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # one that comes now is for all of them
            for rank in range(procs):
                # Two ranks that each take every core get in each other's way: a share each, unless it was set.
                variables = {"OMP_NUM_THREADS": _threads(procs)} | os.environ | _rank_variables(rank, procs, port)
                process = start(variables, outputs[rank] if rank else None)
                if process is None:
                    return None
                ranks.running[rank] = process
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            _wait(ranks, forced_exit_s)
            _report_first_failure(ranks.ended, outputs)
        finally:
            if os.getpid() == launcher:
                for process in ranks.running.values():
                    _kill(process)
                shutil.rmtree(logs, ignore_errors=True)
    failure = next((_as_code(status) for status in ranks.ended.values() if status), 0)
    if set(ranks.ended.values()) == {failure} and failure in AGREED:
        return failure  # agreed by all; after the loss of a folder, the verdict there is another trainer's
    if verdict_file is not None and _identity(verdict_file) != before:
        return (read_verdict(verdict_file.parent) or {"code": failure})["code"]
    return failure


def _threads(procs: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // procs))


def is_alone() -> bool:
    """Whether this process is the whole world, by what its launcher left in the environment; needs no torch."""
    try:
        return discover(os.environ).world_size == 1
    except UserError:  # reported where the ranks meet
        return False


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone, by what its launcher left in the environment; needs no torch."""
    try:
        return discover(os.environ).rank == 0
    except UserError:  # reported where the ranks meet
        return True


def is_under_srun() -> bool:
    """Whether srun started this process, by what its launcher left in the environment; needs no torch."""
    try:
        return discover(os.environ).launcher == "srun"
    except UserError:  # reported where the ranks meet
        return False


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when `parent`, its parent, ends. Linux; elsewhere it does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the request
            os._exit(1)


def _start(argv: list[str], variables: dict[str, str], output: Path | None, listens: bool) -> subprocess.Popen:
    """One rank, in a process group of its own: the terminal's Ctrl-C reaches it once, through this launcher."""
    parent = os.getpid()

    def prepare() -> None:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_BLOCK if listens else signal.SIG_UNBLOCK, STOPPING)

    with open(output or os.devnull, "wb") as file:
        return subprocess.Popen(
            argv,
            env=variables,
            process_group=0,
            stdin=subprocess.DEVNULL,
            stdout=file if output else None,
            stderr=subprocess.STDOUT if output else None,
            preexec_fn=prepare,
        )


def _fork(variables: dict[str, str], output: Path | None) -> Fork | None:
    """The same, as a fork of this process, in which the signals stay held back. Returns None in the fork."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # the child does it too: whichever comes first
        return Fork(pid)
    os.setpgid(0, 0)
    die_with_parent(parent)
    os.environ.update(variables)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    if output is not None:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    return None


def _rank_variables(rank: int, procs: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(procs),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(procs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "AMCLIP_LAUNCHER": "--procs",
    }


@contextmanager
def _forwarding(ranks: _Ranks, heard: list[int]) -> Iterator[None]:
    """While it lasts, the first signal goes to every rank, of later ones INT alone: it may quit a start."""

    def forward(number: int, _: FrameType | None) -> None:
        heard.append(number)
        if ranks.asked_at is None or number == signal.SIGINT:
            ranks.asked_at = ranks.asked_at or time.monotonic()
            for process in list(ranks.running.values()):
                if process.poll() is None:
                    process.send_signal(number)

    old = {number: signal.signal(number, forward) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait(ranks: _Ranks, forced_exit_s: float) -> None:
    """Until every rank has ended, by itself or killed: some time after another one failed, or after a signal."""
    failed_at: float | None = None
    while ranks.running:
        for rank, process in list(ranks.running.items()):
            if (status := process.poll()) is not None:
                ranks.ended[rank] = status
                del ranks.running[rank]
                _kill(process)  # what it left behind
        now = time.monotonic()
        if failed_at is None and any(status not in (0, TO_REQUEUE) for status in ranks.ended.values()):
            failed_at = now  # a rank that has saved and left is no failure: the others may still be at it
        grace = GRACE_S if ranks.asked_at is None else GRACE_WHEN_STOPPING_S
        late = failed_at is not None and now > failed_at + grace
        if late or (ranks.asked_at is not None and now > ranks.asked_at + forced_exit_s):
            for process in ranks.running.values():
                _kill(process)
        time.sleep(0.05)


def _kill(process: Process) -> None:
    """Kills a rank with all that it started, and waits for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    process.wait()


def _report_first_failure(ended: dict[int, int], outputs: list[Path]) -> None:
    """Names the ranks that failed; shows the end of the output of the first, unless it is rank 0, which was seen."""
    failures = [(rank, status) for rank, status in ended.items() if status]
    if not failures or len({status for _, status in failures}) == 1 and ended.get(0, 0):
        return
    rank, status = failures[0]
    if rank != 0:
        with outputs[rank].open("rb") as file:
            file.seek(max(0, outputs[rank].stat().st_size - TAIL_BYTES))
            tail = file.read().decode(errors="replace").strip()
        print(f"--- rank {rank} failed first ({_describe(status)}); the end of its output:\n{tail}", file=sys.stderr)
    others = ", ".join(f"rank {rank} {_describe(status)}" for rank, status in failures[1:])
    print(f"--- rank {rank} {_describe(status)}" + (f"; then {others}" if others else ""), file=sys.stderr)


def _describe(status: int) -> str:
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"


def _as_code(status: int) -> int:
    """A shell's reading of a status: 128 + the signal's number."""
    return 128 - status if status < 0 else status


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Distinguishes one writing of a file from another."""
    try:
        return (path.stat().st_mtime_ns, path.stat().st_ino) if path else None
    except OSError:
        return None
