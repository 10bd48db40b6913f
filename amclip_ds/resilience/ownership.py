"""One trainer per run folder: RUN/owner.json says who; a second one is refused, a dead one's place is taken over.

    with owning(folder, config, job=..., restart=...) as owner:      # collective; the Owner on rank 0, None elsewhere
        owner.claim.check()     # rank 0 or its writer, right before a commit: OwnershipLost if another took over

No flock, which Lustre may not have. A claim is a file `.owner-N` that is created exclusively; the highest N owns, and
taking over writes TAKEN over the lower ones, which stay, so that no number is ever given twice and one who was stopped
meanwhile sees that others came. owner.json carries the heartbeat for people and for later claimants.

An owner counts as gone when its process is (same machine), when the same Slurm job was started again, or when there was
no sign of it for `ownership.stale_s`, neither its claim nor a heartbeat: by the times of files for what has passed, and
for the last three heartbeats by one's own clock. What owner.json says of an older claim says nothing of the highest.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclip_ds import run_files
from amclip_ds.errors import RunStopped, UserError
from amclip_ds.files import not_written, open_regular, read_bytes, read_json, write_atomically, write_new
from amclip_ds.resilience.config import OwnershipConfig
from amclip_ds.resilience.watch_ranks import process_state, start_time

CLAIM = re.compile(r"\.owner-([0-9]{6,15})")
WATCHED_BEATS = 3  # at least so many are waited for: on some file systems the time of a file is its writer's clock
TAKEN = "taken over\n"
FACTS = {
    "claim": int,
    "restart": int,
    "attempt": int,
    "pid": int,
    "started": int,
    "job": str,
    "host": str,
    "machine": str,
    "released": bool,
    "heartbeat": float,
}


class OwnershipLost(RunStopped):
    """Another trainer has the folder: this one commits nothing more and leaves no verdict there."""


@dataclass(frozen=True)
class Claim:
    """Proof of ownership: a path and what is in it. Small, so that a writing process can be given one."""

    path: Path
    token: str

    def holds(self) -> bool:
        """Whether the folder is still ours. Opens the file: only an open makes NFS ask the server.

        A folder that vanished whole is nobody else's: that is the next write's error to report.
        """
        try:
            return read_bytes(self.path, 100, follow=False).decode(errors="replace") == self.token
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                return True  # the disk's trouble, not another trainer
            return not _any_claim(self.path.parent)

    def check(self) -> None:
        """Raises OwnershipLost if the folder is another trainer's by now. Call right before a commit."""
        if not self.holds():
            raise OwnershipLost(f"run.out: another trainer took {self.path.parent} over; nothing more is written")


class Owner:
    """This trainer's hold on the folder, renewed by a thread until `release`. Rank 0 only."""

    def __init__(self, claim: Claim, config: OwnershipConfig, facts: dict[str, Any]) -> None:
        self.claim, self._config, self._facts = claim, config, facts
        self._over = threading.Event()
        self._lost = False
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="owner", daemon=True)
        self._thread.start()

    def is_lost(self) -> bool:
        """Whether another trainer has taken over, as of a heartbeat ago. Costs nothing; before a commit, `check`.

        Checks by itself where the heartbeat stopped: this process was stopped, and may have just been woken.
        """
        if not self._lost and time.monotonic() - self._beat_at > 2 * self._config.heartbeat_s:
            self._lost = not self.claim.holds()
        return self._lost

    def check(self) -> None:
        """Raises OwnershipLost if the folder is another trainer's by now."""
        self.claim.check()

    def set_attempt(self, attempt: int) -> None:
        """Sets the number of the attempt, which is known only once the folder is ours."""
        self._facts["attempt"] = attempt
        self._beat()

    def release(self) -> None:
        """Leaves the folder to whoever comes next, at once. Leaves another owner's files alone."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        if self.claim.holds():
            self._facts["released"] = True
            self._write()

    def _keep_beating(self) -> None:
        while not self._over.wait(self._config.heartbeat_s) and not self._lost:
            self._beat()

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        if not self.claim.holds():
            self._lost = True
        else:
            self._write()

    def _write(self) -> None:
        try:
            write_atomically(
                self.claim.path.parent / run_files.OWNER,
                json.dumps(self._facts | {"heartbeat": round(time.time(), 3)}) + "\n",
            )
        except OSError:  # a full disk for a while; a lasting one is the next commit's to report
            return


def claim(
    folder: Path, config: OwnershipConfig, *, job: str = "", restart: int = 0, say: Callable[[str], None] = print
) -> Owner:
    """Makes this process the folder's one trainer. Rank 0 only; makes the folder.

    job, restart: Slurm's, empty outside it. Raises UserError naming the owner if another trainer is at work there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        last = max(_claims(folder), default=0)
        if last:
            _wait_until_gone(folder, last, config, job, restart, say)
        held = _create(folder, last + 1)
    except OSError as error:
        raise not_written(f"run.out: {folder}", error) from None
    return Owner(
        held,
        config,
        {
            "claim": last + 1,
            "job": job,
            "restart": restart,
            "attempt": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "machine": _machine(),
        },
    )


@contextmanager
def owning(
    folder: Path, config: OwnershipConfig, *, job: str = "", restart: int = 0, say: Callable[[str], None] = print
) -> Iterator[Owner | None]:
    """`claim` for the ranks together: the Owner on rank 0, None elsewhere, a refusal on all. Collective."""
    from amclip_ds.ranks.collectives import on_main  # here: it loads torch, and this module is read before that

    owners: list[Owner] = []
    on_main(lambda: owners.append(claim(folder, config, job=job, restart=restart, say=say)))
    try:
        yield owners[0] if owners else None
    finally:
        for owner in owners:
            owner.release()


def read_owner(folder: Path) -> dict[str, Any] | None:
    """RUN/owner.json, or None if there is none that can be read. Facts of another type than ours are left out."""
    try:
        facts = read_json(folder / run_files.OWNER, dict)
    except UserError:
        return None
    return {name: value for name, kind in FACTS.items() if type(value := facts.get(name)) is kind}


def _wait_until_gone(
    folder: Path, last: int, config: OwnershipConfig, job: str, restart: int, say: Callable[[str], None]
) -> None:
    """Returns once nobody is at work in the folder. Raises UserError as soon as the owner shows that it lives.

    last: the highest claim. owner.json may for a moment be missing, or be another's who was just taken over from; then
    nothing is concluded but from its next change.
    """
    seen = read_owner(folder) or {}
    if seen.get("claim") == last and _is_gone(seen, job, restart):
        return
    wait_s = max(config.stale_s - _age_s(folder, last), WATCHED_BEATS * config.heartbeat_s)
    say(f"{folder} belongs to {describe(seen)}: waiting up to {wait_s:.0f} s for its heartbeat")
    watched_since = time.monotonic()
    while time.monotonic() - watched_since < wait_s:
        time.sleep(min(0.2, config.heartbeat_s / 4))
        now = read_owner(folder) or seen
        if now.get("claim") == last and _is_gone(now, job, restart):
            return
        if now.get("heartbeat") != seen.get("heartbeat"):
            raise UserError(
                f"run.out: {folder} is being trained by {describe(now)}; stop that one first, or take another run.out"
            )
    say(f"{folder}: taken over from {describe(seen)}, whose heartbeat has stopped")


def describe(owner: dict[str, Any]) -> str:
    """An owner in words."""
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"{job}attempt {owner.get('attempt')}, process {owner.get('pid')} on {owner.get('host')}"


def _is_gone(owner: dict[str, Any], job: str, restart: int) -> bool:
    """Whether an owner is known to be gone, or to have no right: Slurm started the same job again since."""
    if owner.get("released"):
        return True
    if job and owner.get("job") == job and restart > int(owner.get("restart") or 0):
        return True
    return owner.get("machine") == _machine() and not process_state(owner.get("pid", 0), owner.get("started", 0))


def _create(folder: Path, number: int) -> Claim:
    """Claim file `number`, created exclusively; the lower ones are taken. Raises UserError if another was quicker."""
    held = Claim(_path_of(folder, number), secrets.token_hex(8))
    try:
        write_new(held.path, held.token)
    except FileExistsError:
        raise UserError(f"run.out: {folder} was taken by another trainer that started at the same moment") from None
    for lower in sorted(_claims(folder)):
        if lower < number:
            _take(_path_of(folder, lower))
    return held


def _take(path: Path) -> None:
    """Ends a claim by a rename: one who is about to write into the file that was there writes into nothing."""
    with contextlib.suppress(FileNotFoundError):
        if read_bytes(path, 100, follow=False) == TAKEN.encode():
            return
    partial = path.with_name(f".taken-{secrets.token_hex(8)}")
    write_new(partial, TAKEN)
    os.replace(partial, path)


def _claims(folder: Path) -> list[int]:
    return [int(found[1]) for name in os.listdir(folder) if (found := CLAIM.fullmatch(name))]


def _any_claim(folder: Path) -> bool:
    try:
        return bool(_claims(folder))
    except OSError:
        return False


def _path_of(folder: Path, number: int) -> Path:
    return folder / f".owner-{number:06d}"


def _age_s(folder: Path, last: int) -> float:
    """Seconds since the last sign of claim `last`, by the clock of the file system: times of files are compared.

    Its own time counts as well as the heartbeat's: who has just claimed has not beaten yet. Each file is opened, which
    makes NFS ask the server for its time.
    """
    probe = folder / f".owner-probe-{secrets.token_hex(8)}"
    try:
        write_new(probe, "")
        now, signs = _written_at(probe), [_written_at(_path_of(folder, last)), _written_at(folder / run_files.OWNER)]
    finally:
        probe.unlink(missing_ok=True)
    if now is None or signs[0] is None:  # the claim has just been taken
        return 0.0
    return max(0.0, now - max(sign for sign in signs if sign is not None))


def _written_at(path: Path) -> float | None:
    try:
        with open_regular(path, follow=False) as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Identifies where a process number means the same here: this boot of this machine, this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(4)}"  # unknown: never taken for the same
