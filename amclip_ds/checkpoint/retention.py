"""What is kept, and how a checkpoint goes: renamed first, so that a kill never leaves half of one under its name.

Rank 0 only, always; nothing here is collective.
"""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from amclip_ds.checkpoint import CheckpointConfig, failpoints, manifest, step_folders
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.checkpoint.writer import describe, sync_folder

PINNED = "pinned"  # a file in a checkpoint's folder that keeps it for good
HELD = f"{PINNED}-by-watch-"  # begins one's name that keeps it while an `amclip watch` loads it, each its own
DELETING, WRITING, SUPERSEDED = ".del-", ".tmp-", "superseded-"
OURS = re.compile(r"(\.del-|\.tmp-|superseded-)step_[0-9]{8,12}(-[0-9]{1,6})?")
"""Names that saves, purges and resumes give to folders; nothing else beside the checkpoints is ever removed."""


def purge(checkpoints: Path, config: CheckpointConfig, newest: int, say: Callable[[str], None]) -> threading.Thread:
    """Removes what need not stay, in a thread; the renames are done on return. newest: the step just committed."""
    gone = [set_aside(path, DELETING) for step, path in expired(checkpoints, config) if step != newest]
    failpoints.reached("purge_renamed")
    thread = threading.Thread(target=_remove_all, args=(gone, say), name="checkpoint-purge", daemon=True)
    thread.start()
    return thread


def expired(checkpoints: Path, config: CheckpointConfig) -> list[tuple[int, Path]]:
    """The checkpoints beyond the newest keep_last that no rule keeps. Damaged ones count for nothing and are left.

    All ranks wait for it, and is_whole looks at every file of every rank: it is asked only of what it decides.
    """
    found, num_kept, every = [], 0, config.keep_every_steps
    for step, path in reversed(step_folders.list_steps(checkpoints)):
        if num_kept < config.keep_last:
            num_kept += is_whole(path)
        elif not (every and step % every == 0) and not is_pinned(path) and is_whole(path):
            found.append((step, path))
    return found[::-1]


def is_whole(path: Path) -> bool:
    """Whether there is a manifest and every file has its size; content is not read."""
    try:
        manifest.check_sizes(path, manifest.read(path))
    except DamagedError:
        return False
    return True


def is_pinned(path: Path) -> bool:
    try:
        return any(name == PINNED or name.startswith(HELD) for name in os.listdir(path))
    except OSError:
        return False


def set_aside(path: Path, prefix: str) -> Path:
    """Renames a checkpoint so that no resume takes it, or a run's weights. Returns the new path. Raises OSError."""
    for number in range(10**6):
        target = path.with_name(f"{prefix}{path.name}-{number}")
        if not target.exists():
            path.rename(target)
            sync_folder(path.parent)
            return target
    raise FileExistsError(17, "too many set aside", str(path))


def supersede(checkpoints: Path, resumed: Path | None, step: int) -> list[Path]:
    """Sets the checkpoints aside that a run which resumes from `step` will write again. Returns their new paths.

    resumed: the one it resumes from, which stays (None: a fresh start). Nothing is deleted. Raises OSError.
    """
    late = [(s, p) for s, p in step_folders.list_steps(checkpoints) if s >= step and not is_same(p, resumed)]
    if not late:
        return []
    write_latest(checkpoints, resumed.name if resumed and resumed.parent.samefile(checkpoints) else None)
    return [set_aside(path, SUPERSEDED) for _, path in late]


def is_same(path: Path, other: Path | None) -> bool:
    return other is not None and path.samefile(other)


def write_latest(checkpoints: Path, name: str | None) -> None:
    """The hint, by rename; None removes it. Raises OSError."""
    if name is None:
        (checkpoints / "latest").unlink(missing_ok=True)
        return
    partial = checkpoints / ".latest.partial"
    with partial.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(checkpoints / "latest")
    sync_folder(checkpoints)


def tidy(checkpoints: Path) -> None:
    """Removes what a killed save or purge left behind."""
    with contextlib.suppress(FileNotFoundError):
        for path in set_aside_as(checkpoints, DELETING) + set_aside_as(checkpoints, WRITING):
            with contextlib.suppress(OSError):
                remove(path)


def set_aside_as(checkpoints: Path, prefix: str) -> list[Path]:
    """What is there under one of our names with that prefix. Raises OSError."""
    names = sorted(name for name in os.listdir(checkpoints) if name.startswith(prefix) and OURS.fullmatch(name))
    return [checkpoints / name for name in names]


def remove(path: Path) -> None:
    """Removes a folder of the run; of a link, the link alone, wherever it points. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _remove_all(paths: list[Path], say: Callable[[str], None]) -> None:
    for path in paths:
        failpoints.reached("purge_middle")
        try:
            remove(path)
        except OSError as error:
            say(f"checkpoint: {path} could not be removed: {describe(error)}")
