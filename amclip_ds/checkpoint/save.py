"""Saves: agree -> snapshot -> write -> agree again -> manifest, fsync, one rename, `latest`, retention.

A failure on any rank is the same error on all, leaves the previous checkpoint untouched and no temporary file behind.
"""

import functools
import importlib.metadata
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds.checkpoint import CheckpointConfig, background, failpoints, files, manifest, retention, step_folders
from amclip_ds.checkpoint.background import Snapshot, WriterProcess
from amclip_ds.checkpoint.files import PlannedFile
from amclip_ds.checkpoint.manifest import Manifest
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.checkpoint.writer import describe, sync_folder, write_file
from amclip_ds.errors import AmclipError, Preempted, RunStopped, UserError

POLL_S = 0.02
SPARE_BYTES = 1 << 20  # for the manifest and the folders themselves
VERSIONED = ("amclip_ds", "torch", "deepspeed", "numpy")


class SaveFailed(AmclipError):
    """A checkpoint could not be written; reported alike on every rank. The one before it is untouched."""

    is_shared = True


@dataclass
class PendingSave:
    """A save under way."""

    step: int
    folder: Path
    """the temporary one"""
    state: CheckpointState
    """its description; its tensors are not read any more"""
    num_bytes: int
    began: float
    deadline: float
    asynchronous: bool
    """agreed among the ranks: where it is, none waits for the others before its next steps"""
    stall_s: float = 0.0
    outcome: dict[str, Any] | None = None
    """what this rank's writing came to; None while the background process works"""


class Saver:
    """The saving of one run. Collective throughout: every rank must call, at the same steps.

    say: one line for people. incident: (kind, cause, action) for incidents.jsonl. before_commit: called on rank 0 right
    before the rename; an AmclipError that it raises aborts the save and is raised on every rank. pausing: entered
    around whatever training waits for, with "save", or "commit" where it is the end of one that is under way.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        *,
        say: Callable[[str], None] = print,
        incident: Callable[[str, str, str], None] = lambda kind, cause, action: None,
        before_commit: Callable[[], None] = lambda: None,
        pausing: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.checkpoints, self.config, self.ranks, self._pausing = checkpoints, config, ranks, pausing
        self._say, self._incident, self._before_commit = say, incident, before_commit
        self._snapshot = Snapshot()
        self._writer: WriterProcess | None = None
        self._pending: PendingSave | None = None
        self._purge: threading.Thread | None = None
        self._saved_at = time.monotonic()
        self.newest: int | None = None
        """the newest step that this saver committed"""
        self.stall_s = 0.0
        """how long training has waited for saves so far"""
        if ranks.is_main:
            retention.tidy(checkpoints)

    def after_step(self, step: int, is_last: bool, describe_state: Callable[[], CheckpointState]) -> None:
        """To be called after every step: ends a background save that is done, begins one that is due.

        A save that fails is reported (line and incident), training continues, the one before it stays; only the last
        one, which is waited for, raises SaveFailed.
        """
        is_due = self._poll(step) or is_last
        if not is_due:
            return
        try:
            with self._pausing("save"):
                self.save(step, describe_state(), wait=is_last)
        except SaveFailed as error:
            if is_last:
                raise
            self._report_failure(error)

    def save(self, step: int, state: CheckpointState, wait: bool = False) -> None:
        """Saves; returns after the copy into host memory (asynchronous), or after the commit (synchronous, or `wait`).

        One that is still under way is ended first. A committed checkpoint of the same step is left as it is. Raises
        SaveFailed on every rank.
        """
        began = time.monotonic()
        self._saved_at = began
        try:
            self._finish_previous()
            if self.newest != step:
                self._begin(step, state, began)
                if self._pending and (wait or not self._pending.asynchronous):
                    self._finish_pending()
        finally:
            self.stall_s += time.monotonic() - began

    def settle(self) -> None:
        """Waits for a save under way. One that fails is recorded, as in `after_step`."""
        if self._pending:
            with self._pausing("commit"):
                self._finish_previous()

    def finish(self) -> None:
        """Waits for a save under way and for removals. Raises SaveFailed."""
        if self._pending:
            with self._pausing("commit"):
                self._finish_pending()
        if self._purge:
            self._purge.join()

    def close(self) -> None:
        """Lets go of memory and process; a save under way is given up. Not collective."""
        self._pending = None
        if self._writer:
            self._writer.close()
            self._writer = None
        self._snapshot.close()
        if self._purge:
            self._purge.join()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Finishes where all ranks leave together: at the end, and at the endings that they agree on. One that a rank
        met alone is none: nobody else would come to this save's collectives."""
        try:
            if error is None or (isinstance(error, Preempted | RunStopped) and error.is_shared):
                self.finish()
        finally:
            self.close()

    # ---------------------------------------------------------------- begin

    def _begin(self, step: int, state: CheckpointState, began: float) -> None:
        planned = files.plan(state, self.ranks.rank, self.ranks.world_size)
        failpoints.reached("agree")
        asynchronous, total = self._agree(step, planned)
        folder = self.checkpoints / f"{retention.WRITING}{step_folders.folder_name(step)}"
        if not self._make_folder(step, folder):
            self.newest = step
            return
        failpoints.reached("make_folder")
        self._pending = PendingSave(step, folder, state, total, began, began + self.config.timeout_s, asynchronous)
        try:
            if not (asynchronous and self._start_writing(folder, planned)):
                self._pending.outcome = {"files": _write_here(folder, planned)}
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self._pending.outcome = {"error": describe(error)}
        self._pending.stall_s = time.monotonic() - began

    def _agree(self, step: int, planned: list[PlannedFile]) -> tuple[bool, int]:
        """Whether this save is asynchronous, and its bytes over all ranks. Raises SaveFailed for want of room."""
        need = sum(file.length for file in planned)
        snapshot = background.size_of(planned)
        reported = self.ranks.gather(
            {
                "step": step,
                "need": need,
                "free": _free_space(self.checkpoints),
                "host": background.host_name(),
                "memory": max(0, snapshot - self._snapshot.size),
                "available": background.available_memory(),
                "possible": background.is_possible(),
            }
        )
        if len({one["step"] for one in reported}) > 1:
            raise SaveFailed(f"the ranks would save different steps: {[one['step'] for one in reported]}")
        total = sum(one["need"] for one in reported)
        free, rank = min((one["free"], rank) for rank, one in enumerate(reported))
        if free < total + SPARE_BYTES:
            raise SaveFailed(
                f"checkpoint of step {step}: needs {_size(total + SPARE_BYTES)}, rank {rank} sees {_size(free)} free at"
                f" {self.checkpoints}"
            )
        asynchronous = self.config.asynchronous and all(one["possible"] for one in reported)
        for host in {one["host"] for one in reported}:
            wanted = sum(one["memory"] for one in reported if one["host"] == host)
            available = min(one["available"] for one in reported if one["host"] == host)
            if asynchronous and wanted > available:
                self._say(
                    f"checkpoint: {host} has {_size(available)} of memory left, a snapshot takes {_size(wanted)}:"
                    f" this save waits for the disk"
                )
                asynchronous = False
        return asynchronous, total

    def _make_folder(self, step: int, folder: Path) -> bool:
        """Makes the temporary folder; False if the step is committed already. Raises SaveFailed on every rank."""
        verdict: str | AmclipError | None = self._refusal() if self.ranks.is_main else None
        if self.ranks.is_main and verdict is None:
            try:
                if (self.checkpoints / step_folders.folder_name(step)).exists():
                    verdict = "exists"
                else:
                    self._notice_a_gone_run(step)
                    self.checkpoints.mkdir(parents=True, exist_ok=True)
                    if folder.exists():
                        shutil.rmtree(folder)
                    for name in ("", "model", "optim", "ema", "rng"):
                        (folder / name).mkdir()
            except OSError as error:
                verdict = describe(error)
                shutil.rmtree(folder, ignore_errors=True)
        verdict = self.ranks.from_main(verdict)
        if isinstance(verdict, AmclipError):
            raise verdict
        if verdict not in (None, "exists"):
            raise SaveFailed(f"checkpoint of step {step}: {verdict}")
        return verdict is None

    def _notice_a_gone_run(self, step: int) -> None:
        run = self.checkpoints.parent
        if self.newest is None or run.exists():
            return
        cause = f"{run} is gone: renamed or removed, with checkpoint {step_folders.folder_name(self.newest)}"
        action = f"made again; the run continues there, its next checkpoint is of step {step}"
        self._say(f"{cause}; {action}")
        self._incident("folder_gone", cause, action)

    def _start_writing(self, folder: Path, planned: list[PlannedFile]) -> bool:
        """Has the files written in the background; False where this rank gets no memory or process for that."""
        try:
            if self._snapshot.grow(background.size_of(planned)) and self._writer:
                self._writer.close()
                self._writer = None
            jobs = self._snapshot.take(planned)
            failpoints.reached("snapshot")
            if self._writer is None:
                self._writer = WriterProcess(self._snapshot.descriptor)
        except (OSError, MemoryError) as error:
            self._snapshot.close()
            cause = f"rank {self.ranks.rank} gets no snapshot: {describe(error)}"
            self._say(f"checkpoint: {cause}: this save waits for the disk")
            self._incident("no_snapshot", cause, "this save waits for the disk")
            return False
        self._writer.send(folder, jobs)
        return True

    # ---------------------------------------------------------------- end

    def _poll(self, step: int) -> bool:
        """Ends a background save that all ranks have done; returns whether one is due by steps or by rank 0's clock."""
        config, pending = self.config, self._pending
        by_steps = config.every_steps is not None and step % config.every_steps == 0
        if pending is None and config.every_minutes is None:
            return by_steps
        is_done = pending is None or self._is_done(pending)
        by_clock = config.every_minutes is not None and time.monotonic() > self._saved_at + 60.0 * config.every_minutes
        is_done, by_clock = self.ranks.all_true_each(is_done, by_clock or not self.ranks.is_main)
        if pending is not None and is_done:
            with self._pausing("commit"):
                self._finish_previous()
        return by_steps or (by_clock and config.every_minutes is not None)

    def _finish_previous(self) -> None:
        """At most one save is in flight: the one before is waited for. Its failure is reported, and this one begins."""
        if self._pending is None:
            return
        try:
            self._finish_pending()
        except SaveFailed as error:
            self._report_failure(error)

    def _is_done(self, pending: PendingSave) -> bool:
        if pending.outcome is None:
            assert self._writer is not None
            pending.outcome = self._writer.answer()
            if pending.outcome is None and time.monotonic() > pending.deadline:
                pending.outcome = {"error": f"not written after {self.config.timeout_s:.0f} s (checkpoint.timeout_s)"}
            if pending.outcome is not None and "error" in pending.outcome:
                self._writer.close()
                self._writer = None
        return pending.outcome is not None

    def _finish_pending(self) -> None:
        """Waits until every rank has written, then commits. Raises SaveFailed, or before_commit's error, everywhere."""
        pending = self._pending
        assert pending is not None
        while not self._is_done(pending):
            time.sleep(POLL_S)
        self._pending = None
        reported = self.ranks.to_main(pending.outcome | {"tensors": files.tensor_sizes(pending.state)})  # type: ignore[operator]
        failpoints.reached("gathered")
        failures = [f"rank {rank}: {one['error']}" for rank, one in enumerate(reported) if "error" in one]
        error = self._refusal() if self.ranks.is_main else None
        if error is None and failures:
            error = SaveFailed(f"checkpoint of step {pending.step}: {'; '.join(failures)}")
        elif error is None and self.ranks.is_main:
            error = self._commit(pending, reported)
        if isinstance(error, SaveFailed) and self.ranks.is_main:  # a refused one's folder may be another trainer's
            shutil.rmtree(pending.folder, ignore_errors=True)
        error = self.ranks.from_main(error)
        if error is not None:
            raise error
        self.newest = pending.step
        failpoints.reached("done")
        took = time.monotonic() - pending.began
        self._say(
            f"checkpoint {step_folders.folder_name(pending.step)}: {_size(pending.num_bytes)}, training waited"
            f" {pending.stall_s:.2f} s, committed after {took:.1f} s"
        )

    def _refusal(self) -> AmclipError | None:
        """Rank 0: what before_commit raises. Asked before anything is touched, and again right before the rename."""
        try:
            self._before_commit()
        except AmclipError as error:
            return error
        return None

    def _commit(self, pending: PendingSave, reported: list[dict[str, Any]]) -> AmclipError | None:
        """Rank 0: manifest, fsync, rename, fsync. Returns why it could not be done."""
        target = self.checkpoints / step_folders.folder_name(pending.step)
        try:
            description = _describe(pending, reported, self.ranks.world_size)
            write_file(pending.folder / manifest.NAME, [manifest.dump(description)])
            sync_folder(pending.folder)
            failpoints.reached("manifest_written")
            self._before_commit()
            failpoints.reached("before_rename")
            pending.folder.rename(target)
            sync_folder(self.checkpoints)
        except AmclipError as error:
            return error
        except OSError as error:
            return SaveFailed(f"checkpoint of step {pending.step}: {describe(error, target)}")
        failpoints.reached("after_rename")
        try:
            retention.write_latest(self.checkpoints, target.name)
            failpoints.reached("latest_written")
            if self._purge:
                self._purge.join()
            self._purge = retention.purge(self.checkpoints, self.config, pending.step, self._say)
        except (OSError, UserError) as error:  # the checkpoint is committed; what follows is housekeeping
            self._say(f"checkpoint {target.name} is committed, but: {describe(error)}")
        return None

    def _report_failure(self, error: SaveFailed) -> None:
        text = f"checkpoint failed: {error}; training continues, the checkpoint before it is untouched"
        self._say(text)
        if self.ranks.is_main:
            self._incident("checkpoint_failed", str(error), "training continues, the checkpoint before it is untouched")


def _write_here(folder: Path, planned: list[PlannedFile]) -> dict[str, Any]:
    """Writes this rank's files from the state itself. Raises OSError."""
    done = {}
    for file in planned:
        try:
            done[file.path] = write_file(folder / file.path, file.content())
        except OSError as error:
            error.filename = error.filename or str(folder / file.path)
            raise
    for parent in sorted({(folder / file.path).parent for file in planned}):
        sync_folder(parent)
    return done


def _describe(pending: PendingSave, reported: list[dict[str, Any]], world_size: int) -> Manifest:
    state = pending.state
    tensors: dict[str, dict[str, int]] = {}
    written: dict[str, dict[str, Any]] = {}
    for one in reported:
        written |= one["files"]
        for kind, sizes in one["tensors"].items():
            tensors.setdefault(kind, {}).update(sizes)
    hashes = {"config": written["config.yaml"]["sha256"]} | state.hashes
    return Manifest(
        step=pending.step,
        world_size=world_size,
        stage=state.stage,
        precision=state.precision,
        files=written,
        tensors=tensors,
        shapes=state.shapes,
        time=round(time.time(), 3),
        attempt=state.attempt,
        hashes=hashes,
        versions={name: _version(name) for name in VERSIONED},
        drift=state.drift,
    )


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _free_space(path: Path) -> int:
    """Bytes free where `path` is or will be; 0 where that is unknown."""
    while True:
        try:
            found = os.statvfs(path)
            return found.f_bavail * found.f_frsize
        except FileNotFoundError:
            if path.parent == path:
                return 0
            path = path.parent
        except OSError:
            return 0


def _size(num_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000  # type: ignore[assignment]
    return f"{num_bytes:.3g} GB"
