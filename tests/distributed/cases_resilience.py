"""Stops, slow ranks and signals on real ranks, without the rest of a run."""

import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from amclip_ds.errors import Preempted
from amclip_ds.ranks import runtime
from amclip_ds.resilience.config import WatchdogConfig
from amclip_ds.resilience.ownership import OwnershipConfig, OwnershipLost, claim, owning
from amclip_ds.resilience.preemption import Preemption, PreemptionConfig, leaving_together
from amclip_ds.resilience.watchdog import OwnTime, Watchdog
from amclip_ds.signals import STOPPING


def loop(stops: Preemption, disturb: dict[int, object], steps: int = 30) -> tuple[int, str | None]:
    """Steps of 20 ms; `disturb[step]` is done in the middle of a step. Returns where and why it stopped."""
    for step in range(1, steps + 1):
        time.sleep(0.01)
        if step in disturb:
            disturb[step]()  # type: ignore[operator]
        time.sleep(0.01)
        reason = stops.agreed()
        if reason is not None:
            return step, reason
    return steps, None


def stop_case(folder: str, to: list[int], how: str, times: int = 1, is_ahead: bool = False) -> dict:
    """Signals `how`, or a file, or a limit, at step 5 of the ranks in `to`. is_ahead: the host is, as on GPUs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    rank = int(os.environ["RANK"])
    started = runtime.start(60)

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, how))
        while stops._listener.count < times:  # a thread notes it, which may be long in coming
            time.sleep(0.001)

    disturb = {5: send} if how.startswith("SIG") and rank in to else {}
    if how == "STOP" and rank == 0:
        disturb = {5: lambda: (time.sleep(0.6), Path(folder, "STOP").touch())}  # type: ignore[dict-item]
    if how == "STOP folder" and rank == 0:
        disturb = {5: lambda: (time.sleep(0.6), Path(folder, "STOP").mkdir())}  # type: ignore[dict-item]
    limit = "00:00:01" if how == "limit" else None
    end = time.time() + 1 if how == "slurm" and rank == 0 else None
    with Preemption(PreemptionConfig(), Path(folder), started, None, end, limit) as stops:
        stops._is_ahead = is_ahead
        step, reason = loop(stops, disturb, 300)
        count = stops._listener.count
    handlers = [signal.getsignal(number) for number in STOPPING]
    runtime.stop(started)
    return {"step": step, "reason": reason, "count": count, "handlers": handlers}


def children_case(folder: str) -> dict:
    """TERM and USR1 to a forked child reach neither it nor the rank's own count."""
    started = runtime.start(60)
    with Preemption(PreemptionConfig(), Path(folder), started) as stops:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2.0,))
        child.start()
        assert child.pid
        time.sleep(0.3)
        for number in STOPPING:
            os.kill(child.pid, number)
        time.sleep(0.3)
        alive = child.is_alive()
        step, reason = loop(stops, {}, 3)
        child.join()
    runtime.stop(started)
    return {"alive": alive, "code": child.exitcode, "reason": reason, "count": stops._listener.count}


def forced_exit_case(folder: str) -> None:
    """A rank that does not come back from its step after a signal is ended by the timer, stacks and all."""
    started = runtime.start(60)
    with Preemption(PreemptionConfig(forced_exit_s=1.0), Path(folder), started):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)  # a save that never ends


def lost_case(folder: str) -> list[str]:
    """Rank 0's folder is taken by another trainer: every rank hears it at the same step."""
    rank = int(os.environ["RANK"])
    started = runtime.start(60)
    quick = OwnershipConfig(heartbeat_s=0.1, stale_s=0.5)

    def take() -> None:
        claim(Path(folder), quick, job="9", restart=1, say=lambda _: None)
        time.sleep(0.3)

    heard = []
    with (
        owning(Path(folder), quick, job="9", say=lambda _: None) as owner,
        Preemption(PreemptionConfig(), Path(folder), started, owner) as stops,
    ):
        try:
            loop(stops, {5: take} if rank == 0 else {})
        except OwnershipLost as error:
            heard.append(str(error))
    runtime.stop(started)
    return heard


def slow_case(seconds: float) -> list[list[tuple[int, str]]]:
    """Rank 1's own work takes `seconds` longer a step. Returns what three logged intervals named."""
    rank = int(os.environ["RANK"])
    started = runtime.start(60)
    import torch.distributed as dist

    own, found = OwnTime(started), []
    for _ in range(3):
        for _ in range(5):
            own.begin(time.monotonic(), is_measured=True)
            time.sleep(0.02 + (seconds if rank == 1 else 0))
            own.end()
            dist.barrier()
            time.sleep(0.02)
            own.end()  # a later collective of the same step
            dist.barrier()
        found.append(own.compare())
    runtime.stop(started)
    return found


def leaving_case(launcher: str) -> str:
    """How a rank leaves after an agreed stop."""
    os.environ["AMCLIP_LAUNCHER"] = launcher
    started = runtime.start(60)
    try:
        with leaving_together(started):
            raise Preempted("stop")
        return "left with 0"
    except Preempted as error:
        return f"left with {error.exit_code}"
    finally:
        runtime.stop(started)


def mount_own(folder: str, options: str) -> None:
    """A temporary storage that this process alone sees, as a container of its own has."""
    c, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x00020000
    assert c.unshare(new_user | new_mounts) == 0, os.strerror(ctypes.get_errno())
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    assert c.mount(b"none", folder.encode(), b"tmpfs", 0, options.encode()) == 0, os.strerror(ctypes.get_errno())


def tmp_case(folder: str, alone: int, options: str) -> dict[str, Any]:
    """A watchdog where rank `alone` has a temporary storage of its own, with these options of tmpfs."""
    rank = int(os.environ["RANK"])
    if rank == alone:
        mount_own(folder, options)
    tempfile.tempdir = folder
    started = runtime.start(60)
    import torch
    import torch.distributed as dist

    with Watchdog(WatchdogConfig(step_timeout_s=60.0), Path(folder), 0, started) as watchdog:
        for step in range(3):
            watchdog.phase("step", step)
            dist.all_reduce(torch.ones(1))
        found = {"process": watchdog._process is not None, "said": list(watchdog._ended)}
    runtime.stop(started)
    return found | {"left": sorted(path.name for path in Path(folder).glob("amclip-watch-*"))}
