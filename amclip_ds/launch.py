"""`amclip train --procs N`: starts the ranks of one machine, forwards signals once, ends them together.

The ranks die with this process (PR_SET_PDEATHSIG). Rank 0 writes to the terminal; of another rank that fails first the
end of its output is shown. The verdict is RUN/exit.json, which rank 0 writes after its last commit; the processes' own
statuses count only where there is none.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class _Ranks:
    """The children, and what was asked of them."""

    running: dict[int, subprocess.Popen] = field(default_factory=dict)
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
    verdict_file = Path(run_folder, run_files.VERDICT) if run_folder is not None else None
    before = _identity(verdict_file)
    port = free_port()
    ranks = _Ranks()
    with tempfile.TemporaryDirectory(prefix="amclip-") as logs, _forwarding(ranks, heard if heard is not None else []):
        outputs = [Path(logs, f"rank{rank}") for rank in range(procs)]
        try:
            for rank in range(procs):
                # Two ranks that each take every core get in each other's way: a share each, unless it was set.
                threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // procs))}
                variables = threads | os.environ | _rank_variables(rank, procs, port) | (env or {})
                ranks.running[rank] = _start(argv, variables, outputs[rank] if rank else None, listens)
            _wait(ranks, forced_exit_s)
        finally:
            for process in ranks.running.values():
                _kill(process)
        _report_first_failure(ranks.ended, outputs)
    failure = next((_as_code(status) for status in ranks.ended.values() if status), 0)
    if set(ranks.ended.values()) == {failure} and failure in AGREED:
        return failure  # agreed by all; after the loss of a folder, the verdict there is another trainer's
    if verdict_file is not None and _identity(verdict_file) != before:
        return (read_verdict(verdict_file.parent) or {"code": failure})["code"]
    return failure


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
        if listens:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

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
            if process.poll() is not None:
                ranks.ended[rank] = process.returncode
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


def _kill(process: subprocess.Popen) -> None:
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
