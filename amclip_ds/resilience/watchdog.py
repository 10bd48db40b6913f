"""A rank's signs of life, and the process beside it that reads them: a hang ends the run and names rank and phase.

    with Watchdog(config.watchdog, folder, attempt, runtime) as watchdog:
        for batch in watchdog.watched(batches, step): ...   # signs of life: a write into shared memory each
        with watchdog.during("save"): ...                   # what may take longer than a step
        watchdog.report_slow_ranks(record)                    # names ranks that the others wait for; collective

One watching process per node (watch_ranks.py): a rank whose interpreter is stuck or stopped cannot watch itself.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from amclip_ds.data.batch import Batch
from amclip_ds.files import describe
from amclip_ds.ranks.collectives import gather_objects
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.record import Record
from amclip_ds.resilience import watch_ranks
from amclip_ds.resilience.config import WatchdogConfig
from amclip_ds.resilience.watch_ranks import BEAT, COMPILE, DONE, STACKS_SIGNAL
from amclip_ds.signals import held_back

SLOW_FACTOR = 1.5  # a straggler's own work takes so many times the others' median
SLOW_SHARE = 0.25  # and costs at least so much of a step
RESTARTS = 20  # of the watching process, in one run
UNNOTICED = "no hang is noticed there"
SLOW_INTERVALS = 2  # in so many logged intervals in a row


class Watchdog:
    """Signs of life of this rank; on one rank of each node also the watching process's parent.

    Making one is collective: every rank must call. folder: the run's.
    """

    def __init__(self, config: WatchdogConfig, folder: Path, attempt: int, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        self._process: subprocess.Popen | None = None
        self._memory: mmap.mmap | None = None
        self._stacks: TextIO | None = None
        self._made = ""  # the node's folder, on the rank that made it
        self._phase, self._step = "start", 0
        self._is_warm = False
        self._is_closing = False
        self._ended: list[tuple[str, str]] = []  # what is to be recorded of the watching process
        self._own = OwnTime(runtime)
        if config.step_timeout_s is None:
            return
        problem, ranks, hosts = self._meet()
        if not self._all_open(problem):  # else every rank of this node can be watched
            self._let_go()
            return
        self.phase("start", 0)
        if runtime.local_rank == 0:
            try:
                self._write_settings(folder, attempt, ranks, hosts, poll_s=min(1.0, config.step_timeout_s / 20))
                self._process = self._start()
            except OSError as error:
                self._report(f"on {socket.gethostname()} no watching process starts ({describe(error)})", UNNOTICED)
                return
            threading.Thread(target=self._keep_it_alive, name="watchdog", daemon=True).start()

    def phase(self, name: str, step: int) -> None:
        """A sign of life: from now on this rank is in `name`, with `step` steps behind it."""
        now = time.monotonic()
        if name == "data":
            self._is_warm = self._is_warm or self._phase == "step"  # the first step may compile, and is no measure
            self._own.begin(now, is_measured=self._is_warm)
        self._phase, self._step = name, step
        self._beat(name, now)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A phase inside the loop, such as an evaluation or a save; afterwards the former one continues."""
        before = self._phase
        self.phase(name, self._step)
        try:
            yield
        finally:
            self.phase(before, self._step)

    def compile_begins(self) -> None:
        """Something is compiled, which may take longer than a step; the step that has to is no measure either."""
        self._own.leave_out()
        self._beat(COMPILE, time.monotonic())

    def compile_ends(self) -> None:
        """The former phase continues, with all its time."""
        self._beat(self._phase, time.monotonic())

    def watched(self, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        """The same batches; `step` steps are done before the first. What happens between two of them is a step."""
        while True:
            self.phase("data", step)
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.phase("step", step)
            yield batch
            step += 1

    def arrived(self) -> None:
        """Called by the first collective of a step: what came before was this rank's own work."""
        self._own.end()

    def report_slow_ranks(self, record: Record) -> None:
        """Names the ranks that the others wait for, on the screen and in incidents.jsonl. Collective.

        Compares what each rank took, since the last call, from a step's beginning to its first collective.
        """
        while self._ended:
            cause, action = self._ended.pop(0)
            record.say(f"{cause}; {action}")
            record.incident("watchdog", cause, action=action)
        for rank, cause in self._own.compare():
            record.say(cause)
            if rank == self._runtime.rank:
                record.incident("straggler", cause, action="reported only")

    def close(self) -> None:
        """Ends the watch of this rank; the watching process ends once all ranks of the node have."""
        if self._memory is None:
            return
        self._is_closing = True
        self.phase(DONE, self._step)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5.0)
        self._let_go()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _beat(self, phase: str, now: float) -> None:
        if self._memory is not None and self._config.step_timeout_s is not None:
            short = self._is_warm and phase in ("data", "step")
            limit_s = self._config.step_timeout_s if short else self._config.phase_timeout_s
            self._memory[: BEAT.size] = BEAT.pack(self._pid, self._started, self._step, now, limit_s, phase.encode())

    def _meet(self) -> tuple[str, list[int], list[str]]:
        """Why this node has no folder for signs of life, in its own temporary storage; its ranks; the hosts of all.

        Collective: every rank must call.
        """
        runtime, problem = self._runtime, ""
        if runtime.local_rank == 0:
            try:
                self._made = tempfile.mkdtemp(prefix="amclip-watch-")
            except OSError as error:
                problem = describe(error)
        own = (runtime.rank, runtime.node_rank, socket.gethostname(), self._made, problem)
        found = gather_objects(own)
        here = [(rank, made, problem) for rank, node, _, made, problem in found if node == runtime.node_rank]
        self._place = Path(next((made for _, made, _ in here if made), "nowhere"))
        hosts = {node: host for _, node, host, *_ in found}
        return (
            next((problem for *_, problem in here if problem), ""),
            [rank for rank, *_ in here],
            [hosts[node] for node in sorted(hosts)],
        )

    def _all_open(self, problem: str) -> bool:
        """Whether every rank of this node can be watched. Rank 0 says where that is not so: no reason not to train.

        Collective: every rank must call.
        """
        if not problem:
            try:
                self._open_beat()
            except OSError as error:  # a /tmp that each task has to itself, or a full one
                problem = f"{self._place}: {describe(error)}"
        found = gather_objects((self._runtime.node_rank, socket.gethostname(), problem))
        unwatched = {node: host for node, host, problem in found if problem}
        if unwatched and self._runtime.is_main:
            where = ", ".join(unwatched.values())
            first = next(problem for *_, problem in found if problem)
            self._report(f"on {where} the ranks have no temporary folder in common ({first})", UNNOTICED)
        return self._runtime.node_rank not in unwatched

    def _let_go(self) -> None:
        """Of what is open, and of the node's folder."""
        if self._stacks is not None:
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()
            self._stacks = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._made:
            shutil.rmtree(self._made, ignore_errors=True)

    def _report(self, cause: str, action: str) -> None:
        """At once on the screen, and in incidents.jsonl with the next row."""
        print(f"watchdog: {cause}; {action}", file=sys.stderr, flush=True)
        self._ended.append((cause, action))

    def _open_beat(self) -> None:
        rank = self._runtime.rank
        self._stacks = (self._place / f"rank{rank}.stacks").open("w")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        with (self._place / f"rank{rank}.beat").open("w+b") as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._pid = os.getpid()
        self._started = watch_ranks.start_time(self._pid)

    def _write_settings(self, folder: Path, attempt: int, ranks: list[int], hosts: list[str], poll_s: float) -> None:
        settings = {
            "run": str(folder.resolve()),
            "attempt": attempt,
            "ranks": ranks,
            "node": self._runtime.node_rank,
            "hosts": hosts,
            "meeting": list(self._runtime.meeting),
            "poll_s": poll_s,
        }
        (self._place / "settings.json").write_text(json.dumps(settings))

    def _start(self) -> subprocess.Popen:
        with held_back():  # a rank's end, not a signal, ends the watch
            return subprocess.Popen(
                [sys.executable, "-I", "-S", watch_ranks.__file__, str(self._place)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def _keep_it_alive(self) -> None:
        """Starts the watching process again where it was killed: a hang that comes later must be noticed too.

        A thread of its own, since the training thread may be the one that hangs.
        """
        for left in reversed(range(RESTARTS + 1)):
            assert self._process is not None
            status = self._process.wait()
            if self._is_closing:
                return
            is_possible = left > 0 and (self._place / "settings.json").exists()
            action = "started again" if is_possible else "no hang is noticed any more"
            self._report(f"the watching process ended by itself (status {status})", action)
            if not is_possible:
                return
            self._process = self._start()


class OwnTime:
    """How long this rank's own work takes in a step: data and forward pass, up to the first collective.

    Behind that point all ranks wait for each other, and every rank's time is the slowest one's.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._is_cuda = runtime.device.type == "cuda"
        self._since: float | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None
        self._own_s, self._steps, self._first_at, self._last_at = 0.0, 0, 0.0, 0.0
        self._slow_for = [0] * runtime.world_size

    def begin(self, now: float, is_measured: bool) -> None:
        """A step begins; all ranks have just left a collective together."""
        if self._steps == 0:
            self._first_at = now
        self._last_at, self._since = now, now if is_measured else None
        if self._is_cuda and is_measured:  # the device's own clock: the host is ahead of it
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()

    def leave_out(self) -> None:
        """The step that has begun is no measure."""
        self._since = self._begun = None

    def end(self) -> None:
        """The step's first collective is about to begin; later ones are not counted."""
        if self._since is None:
            return
        if self._begun is not None:
            arrived = torch.cuda.Event(enable_timing=True)
            arrived.record()
            self._events.append((self._begun, arrived))
        else:
            self._own_s += time.monotonic() - self._since
        self._steps += 1
        self._since = self._begun = None

    def compare(self) -> list[tuple[int, str]]:
        """See `Watchdog.report_slow_ranks`. Collective: every rank must call."""
        world, steps = self._runtime.world_size, max(1, self._steps)
        if self._events:
            torch.cuda.synchronize(self._runtime.device)
            self._own_s += sum(begun.elapsed_time(arrived) for begun, arrived in self._events) / 1e3
        step_s = (self._last_at - self._first_at) / max(1, self._steps - 1)
        own_s, measured = self._own_s / steps, self._steps
        self._events.clear()
        self._own_s, self._steps = 0.0, 0
        if world == 1:
            return []
        rows = list(torch.zeros(world, 3, dtype=torch.float64, device=self._runtime.device))
        own = torch.tensor([own_s, step_s, measured], dtype=torch.float64, device=self._runtime.device)
        dist.all_gather(rows, own)
        gathered = torch.stack(rows)
        return self._judge(gathered[:, 0].tolist(), float(gathered[:, 1].median()), int(gathered[:, 2].min()))

    def _judge(self, own: list[float], step_s: float, measured: int) -> list[tuple[int, str]]:
        """Pure but for the count of intervals in a row; the same on every rank."""
        found = []
        for rank, seconds in enumerate(own):
            others = statistics.median(own[:rank] + own[rank + 1 :])
            is_slow = measured > 1 and seconds > SLOW_FACTOR * others and seconds - others > SLOW_SHARE * step_s
            self._slow_for[rank] = self._slow_for[rank] + 1 if is_slow else 0
            if self._slow_for[rank] == SLOW_INTERVALS:  # reported once, until it has been well again
                found.append(
                    (
                        rank,
                        f"rank {rank} takes {seconds:.3f} s of its own a step (data and forward pass), the"
                        f" others {others:.3f} s: all wait for it",
                    )
                )
        return found
