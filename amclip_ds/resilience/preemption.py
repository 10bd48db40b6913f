"""A stop that all ranks agree on: a signal to any of them, a STOP file, a time limit; the same step, the same reason.

    preemption.listen()                          # as early as possible: from here on no signal is lost or kills
    with Preemption(config, folder, ...) as stops:
        reason = stops.agreed()                  # once a step, collective: None, or why the run is to save and stop

Signals only leave a note: nothing is torn, however many arrive. From the first one on a timer runs, in C and without
the interpreter's lock, that prints all stacks and ends the process if saving and leaving take too long. Under srun a
run that has no step behind it leaves at once: its job's time may end before an index or a compilation does.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from amclip_ds import run_files
from amclip_ds.errors import INTERRUPTED, Preempted
from amclip_ds.files import describe
from amclip_ds.resilience.config import PreemptionConfig, read_duration
from amclip_ds.resilience.ownership import Owner, OwnershipLost
from amclip_ds.signals import STOP_FILE, STOPPING, heeded

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.ranks.runtime import Runtime

NAMES = tuple(number.name for number in STOPPING)
REASONS = ("run.time_limit", "the end of the Slurm job", STOP_FILE, *NAMES, "ownership")  # the weightiest last
STDERR = 2
CHECK_EVERY_S = 0.5  # for the STOP file: a stat a step would be felt on a parallel file system
OWN_LAUNCHERS = ("alone", "--procs")  # the others turn 75 into a code of their own
LEAVE_AFTER_S = 3.0  # until then every rank has heard the signal: one that is left by the others has not crashed


class SignalListener:
    """The signals that reached this process, noted by a thread of its own so that a blocked main thread delays none."""

    def __init__(self, forced_exit_s: float, leaves_early: bool = False) -> None:
        self.first: str | None = None
        """The name of the first one."""
        self.count = self.interrupts = 0
        self.is_starting = True
        """Whether no step is behind this process: there is nothing yet that a second Ctrl-C could lose."""
        self.forced_exit_s = forced_exit_s
        self.leaves_early = leaves_early
        """Whether a stop during the start ends this process with code 0, as srun wants it, and no verdict: the batch
        script requeues a job whose ranks have all left so."""
        self.is_closed = self.is_armed = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _on_signal) for number in heeded()}
        os.register_at_fork(after_in_child=self._in_child)
        threading.Thread(target=self._note, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a launcher may have held them back until now

    def _note(self) -> None:
        while arrived := os.read(self._reader, 64):
            for number in arrived:
                if number in self._old:
                    self.note(signal.Signals(number).name)
        os.close(self._reader)

    def note(self, name: str) -> None:
        """Counts one arrival; the first starts the forced-exit timer, a second Ctrl-C during the start quits."""
        self.count += 1
        self.interrupts += name == "SIGINT"
        if self.is_starting and self.interrupts > 1:
            _say("interrupted before the first step, nothing is lost; the same command starts again")
            os._exit(INTERRUPTED)  # the main thread may be in anything: an import, a meeting, an index
        if self.first is None:
            self.first = name
            self.arm()
            if self.is_starting and self.leaves_early:
                _say(f"{name}: before the first step there is nothing to save; leaving")
                timer = threading.Timer(LEAVE_AFTER_S, self._leave)
                timer.daemon = False  # an interpreter that ends before, since the others are gone, waits for it
                timer.start()
                return
            again = "; Ctrl-C again quits at once" if self.is_starting and name == "SIGINT" else ""
            _say(f"{name}: saving and stopping after {'the first' if self.is_starting else 'this'} step{again}")

    def _leave(self) -> None:
        if self.is_starting:  # a first step that was done meanwhile is saved as any other
            os._exit(0)

    def arm(self) -> None:
        """Starts the forced-exit timer, or starts it anew with the present `forced_exit_s`."""
        self.is_armed = True
        faulthandler.dump_traceback_later(self.forced_exit_s, exit=True, file=STDERR)

    def _in_child(self) -> None:
        """A process that a rank forks ignores the signals, and writes none into the rank's pipe."""
        if not self.is_closed:
            ignore_signals()

    def close(self) -> None:
        """Gives the signals their old meaning back and stops the timer. Main thread only.

        Of a process that was asked to stop, and so is leaving, neither: the timer bounds its end, and a late signal
        must not take the exit code's place.
        """
        self.is_closed = True
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if self.is_armed else handler)
        os.close(self._writer)
        if not self.is_armed:
            faulthandler.cancel_dump_traceback_later()


_listener: SignalListener | None = None  # signals are the process's, so this is too


def listen(forced_exit_s: float = PreemptionConfig.forced_exit_s, leaves_early: bool = False) -> SignalListener:
    """From here on USR1, TERM, INT and HUP (under nohup not the last) are noted and end nothing. Main thread only; a
    second call changes the timer. leaves_early: see SignalListener."""
    global _listener
    if _listener is None:
        _listener = SignalListener(forced_exit_s, leaves_early)
    elif _listener.forced_exit_s != forced_exit_s:
        _listener.forced_exit_s = forced_exit_s
        if _listener.first is not None:
            _listener.arm()
    return _listener


@contextmanager
def restoring_signals() -> Iterator[None]:
    """For a program that does not end with its training, or command: a run that was asked to stop ends with its
    signals ignored and the forced-exit timer running, as is right where the process ends with it. Main thread only."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def ignore_signals() -> None:
    """For a process that a rank forks: the rank decides when it ends."""
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Preemption:
    """What may ask this run to stop, and the agreement on it.

    folder: the run's; a file STOP in it asks. owner: rank 0's hold on it. job_end: of the Slurm job, in seconds since
    the epoch. time_limit: `run.time_limit`, counted from here. The last three count on rank 0 alone.
    """

    def __init__(
        self,
        config: PreemptionConfig,
        folder: Path,
        runtime: "Runtime",
        owner: Owner | None = None,
        job_end: float | None = None,
        time_limit: str | None = None,
    ) -> None:
        self._config, self._stop_file, self._runtime, self._owner = config, folder / run_files.STOP, runtime, owner
        self._is_ahead = runtime.device.type == "cuda"
        self._asked: Callable[[], Tensor] | None = None
        self._listener = listen(config.forced_exit_s)
        self._deadlines: dict[str, float] = {}
        self._time_limit = time_limit
        if time_limit is not None:
            self._set_deadline("run.time_limit", read_duration(time_limit, "run.time_limit"))
        if job_end is not None:
            self._set_deadline("the end of the Slurm job", job_end - time.time())
        self._looked_at = 0.0
        self._stop_asked = False

    def _set_deadline(self, name: str, seconds: float) -> None:
        margin = min(self._config.before_limit_s, 0.1 * seconds)
        self._deadlines[name] = time.monotonic() + seconds - margin

    def agreed(self, is_last: bool = False) -> str | None:
        """Why the run is to save and stop now, the same on all ranks; None: train on. Collective: every rank must call.

        One all-reduce of one number; on GPUs a reason is heard a step later, but for the first and the last step.
        is_last: the run ends with this step anyway, nothing needs to stop it. Raises OwnershipLost, on every rank,
        where another trainer has the folder: call before the step is recorded there.
        """
        own = self._own_reason()
        world = self._runtime.world_size
        code = -1 if own is None else REASONS.index(own) * world + self._runtime.rank
        if world > 1:
            code = self._largest(code, is_last)
        self._listener.is_starting = False  # now that no rank is still in its first step
        if code < 0:
            return None
        index, rank = divmod(code, world)
        if REASONS[index] == "ownership":
            raise OwnershipLost("run.out: another trainer took this folder over; stopped without saving")
        if REASONS[index] == STOP_FILE and self._runtime.is_main:
            self._remove_stop_file()  # it has been read: started again, the run continues
        if is_last:
            return None
        self._listener.arm()
        return self._describe(REASONS[index], rank)

    def _remove_stop_file(self) -> None:
        try:
            self._stop_file.unlink(missing_ok=True)
        except OSError as error:  # a folder, or another's file in a folder of many
            _say(f"{self._stop_file} cannot be removed ({describe(error)}): remove it by hand before the run resumes")

    def _largest(self, code: int, is_last: bool) -> int:
        """Of all ranks. Ahead, that of the step before: this one's would be waited for, and with it everything that the
        device still has to do."""
        import torch
        import torch.distributed as dist

        from amclip_ds.host_copies import begin_download, upload

        packed = upload(torch.tensor([code]), self._runtime.device)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        newest = begin_download(packed)
        read = newest if is_last or self._asked is None else self._asked
        self._asked = newest if self._is_ahead else None
        return int(read().item())

    def _own_reason(self) -> str | None:
        """What this rank knows, the weightiest first."""
        if self._owner is not None and self._owner.is_lost():
            return "ownership"
        if self._listener.first is not None:
            return self._listener.first
        now = time.monotonic()
        if self._runtime.is_main:  # one clock and one read of the disk decide
            if now >= self._looked_at + CHECK_EVERY_S:
                self._looked_at = now
                # Not Path.exists, which raises a file system's bad moments: those must not end the run
                self._stop_asked = os.path.exists(self._stop_file)
            if self._stop_asked:
                return STOP_FILE
            return next((name for name, deadline in self._deadlines.items() if now >= deadline), None)
        return None

    def _describe(self, reason: str, rank: int) -> str:
        if reason.startswith("SIG"):
            return f"{reason} on rank {rank}"
        if reason == "run.time_limit":
            return f"run.time_limit={self._time_limit} is near"
        return f"{reason} is near" if reason in self._deadlines or reason.startswith("the end") else reason

    def close(self) -> None:
        """See `SignalListener.close`."""
        global _listener
        if _listener is self._listener:
            _listener = None
            self._listener.close()

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def leaving_together(runtime: "Runtime") -> Iterator[None]:
    """Swallows Preempted under launchers that would turn 75 into a failure: the ranks meet, and leave with 0.

    The verdict is RUN/exit.json's. Collective where Preempted is raised, which every rank must do alike.
    """
    try:
        yield
    except Preempted:
        if runtime.world_size > 1:
            import torch.distributed as dist

            with contextlib.suppress(RuntimeError):  # a rank that is gone already cannot make it worse
                dist.barrier()
        if runtime.launcher in OWN_LAUNCHERS:
            raise


def _say(text: str) -> None:
    print(f"amclip train: {text}", file=sys.stderr, flush=True)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """The handler proper: the interpreter has already written the number into the pipe."""
