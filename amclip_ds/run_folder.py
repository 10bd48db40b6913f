"""A run's folder: made and described before the first step, given its weights after the last."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from amclip_ds import config as settings
from amclip_ds import plugins, run_files
from amclip_ds.checkpoint.retention import SUPERSEDED, set_aside
from amclip_ds.config import TrainConfig
from amclip_ds.errors import AmclipError, in_one_line
from amclip_ds.files import not_written, removed_on_error, sync, write_atomically, write_new
from amclip_ds.jsonl import append_line, read
from amclip_ds.preconditions import check_folder
from amclip_ds.ranks.collectives import on_main
from amclip_ds.record import read_verdict
from amclip_ds.record.backlog import Backlog
from amclip_ds.record.timeline import Timeline
from amclip_ds.redact import redact, redact_all
from amclip_ds.resilience.ownership import Owner, OwnershipLost

if TYPE_CHECKING:
    from amclip_ds.engine.student import StudentEngine
    from amclip_ds.engine.teacher import Teacher

MAX_CHANGES = 1 << 20  # characters
PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "transformers",
    "webdataset",
    "accelerate",
    "open_clip_torch",
    "safetensors",
    "numpy",
)


def open_folder(config: TrainConfig) -> tuple[Path, int]:
    """Makes the run's folder, with config.yaml and versions.json if it has none, and checkpoints/. Rank 0 only.

    Returns the folder and the number of this attempt, 0 on the first start. An older attempt's exit.json goes: a run
    that leaves none has crashed. Raises UserError, or AmclipError where the disk is full.
    """
    folder = Path(config.run.out)
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        attempt = next_attempt(folder)
        (folder / run_files.VERDICT).unlink(missing_ok=True)
        if not (folder / run_files.CONFIG).exists():
            write_settings(folder, config, write_atomically)
        # Before any rank asks for it: a node remembers for seconds that its network file system had no such name, and
        # its ranks open their files there as soon as rank 0 has begun a save.
        (folder / run_files.CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise not_written(f"run.out: {folder}", error) from None
    return folder, attempt


def write_settings(folder: Path, config: TrainConfig, write: Callable[[Path, str], None]) -> None:
    """RUN/config.yaml, versions.json and a copy of each plug-in's file. Again at every start, but after the resume: one
    that is refused for what its settings would change must not leave them in the run's name. Raises what `write` does.
    Rank 0 only.
    """
    write(folder / run_files.CONFIG, settings.dump(config))
    write(folder / run_files.VERSIONS, describe_versions())
    for plugin in plugins.LOADED.values():
        if plugin.text is not None:
            write(folder / run_files.copy_of(plugin.name, plugin.hash), plugin.text.decode(errors="replace"))
    if changes := git_changes():
        write(folder / run_files.CHANGES, changes)
    else:  # a start before this one may have had some
        with suppress(OSError):
            (folder / run_files.CHANGES).unlink()


def next_attempt(folder: Path) -> int:
    """Counts the starts of a run in RUN/attempts.jsonl; returns the number of this one, 0 for the first."""
    rows, unreadable = read(folder / run_files.ATTEMPTS)
    numbers = [row["attempt"] for row in rows if type(row.get("attempt")) is int]
    attempt = max([len(rows) + unreadable, *(number + 1 for number in numbers)])
    append_line(folder / run_files.ATTEMPTS, {"attempt": attempt, "time": round(time.time(), 3), "command": sys.argv})
    return attempt


class HasStep(Protocol):
    """What knows where the run is."""

    step: int


@contextmanager
def write_verdict_at_end(
    folder: Path, attempt: int, state: HasStep, is_main: bool, owner: Owner | None = None
) -> Iterator[None]:
    """Leaves RUN/exit.json and report.html when the block ends, well or with an AmclipError; a crash leaves none.

    Rank 0 does it for all, and any rank for an error that it met alone: of that the others hear only that it is gone.

    owner: rank 0's hold on the folder. Once it is another trainer's, so is the verdict in it: OwnershipLost then takes
    the place of whatever error that has led to.
    """
    try:
        yield
    except OwnershipLost:
        raise
    except AmclipError as error:
        if owner is not None:
            owner.check()
        is_first = (is_main or not error.is_shared) and write_first_error(folder, error, state.step, attempt, is_main)
        if is_first:
            write_last_report(folder)
        raise
    if is_main:
        write_verdict(folder, 0, state.step, attempt, "done")
        write_last_report(folder)


def write_first_error(folder: Path, error: AmclipError, step: int, attempt: int, is_main: bool) -> bool:
    """RUN/exit.json, created exclusively: where several ranks fail, the first one's error stays, since it may be what
    the others fail of. Returns whether that is this one."""
    try:
        write_new(folder / run_files.VERDICT, _verdict(error.exit_code, step, attempt, str(error)))
    except OSError:
        left = read_verdict(folder) or {}
        if not is_main or (left.get("attempt") == attempt and left["code"]):
            return False
        write_verdict(folder, error.exit_code, step, attempt, str(error))  # over a stranger's; or of a disk in trouble
        return True
    _add_end(folder, error.exit_code, step, attempt, str(error))
    return True


def write_verdict(folder: Path, code: int, step: int, attempt: int, reason: str) -> None:
    """RUN/exit.json: what a launcher's status cannot be trusted to say. Rank 0 only, after the last commit.

    Waits a little for a disk that does not take it; without it, the processes' own statuses count.
    """
    backlog = Backlog(lambda cause, outcome: None)
    backlog.replace(folder / run_files.VERDICT, _verdict(code, step, attempt, reason))
    backlog.close()
    _add_end(folder, code, step, attempt, reason)


def _verdict(code: int, step: int, attempt: int, reason: str) -> str:
    return json.dumps({"code": code, "step": step, "attempt": attempt, "reason": reason}) + "\n"


def _add_end(folder: Path, code: int, step: int, attempt: int, reason: str) -> None:
    timeline = Timeline(folder, attempt, is_main=True)
    timeline.step = step
    timeline.add("end", code=code, reason=reason)


def write_last_report(folder: Path) -> None:
    """RUN/report.html. Whatever keeps it from being written keeps nothing else. Rank 0 only."""
    from amclip_ds.report.page import write_report

    try:
        write_report([folder], folder / run_files.REPORT)
    except Exception as error:
        print(f"report: not written: {in_one_line(error, 300)}; `amclip report {folder}` writes it", file=sys.stderr)


def describe_versions() -> str:
    """Packages, Python, machine, command and git revision, as JSON."""
    versions = {name: _version(name) for name in PACKAGES}
    facts = {
        "amclip_ds": _version("amclip_ds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "git": git_revision(),
        "command": redact_all(sys.argv),
    }
    return json.dumps(facts | versions, indent=1) + "\n"


def _version(package: str) -> str | None:
    """None for what was never installed, as this package where it is run from its folder."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The revision this package was run from, with `+changes` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = _git("rev-parse", "HEAD", cwd=here)
        return revision + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", cwd=here) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def git_changes() -> str:
    """What differs here from the revision that git_revision names, as a patch; empty where nothing does, or nobody
    can say, or where it is longer than any patch that is meant."""
    try:
        patch = _git("diff", "HEAD", cwd=Path(__file__).parents[1])
    except (OSError, subprocess.SubprocessError):
        return ""
    return redact(patch) + "\n" if 0 < len(patch) <= MAX_CHANGES else ""


def _git(*words: str, cwd: Path) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def write_run_weights(folder: Path, student: "StudentEngine", teacher: "Teacher | None", step: int) -> None:
    """RUN/student.safetensors and RUN/teacher.safetensors, whole and in fp32. Collective: every rank must call.

    Raises AmclipError, on all ranks, where they cannot be written: the checkpoint is committed, a restart writes them.
    """
    for name, source in (("student", student), ("teacher", teacher)):
        if source is None:
            continue
        tensors = source.full_state()
        metadata = {"format": "pt", "weights": name, "step": str(step)}
        try:
            on_main(partial(write_weights, folder / f"{name}.safetensors", tensors, metadata))
        except (OSError, AmclipError, SafetensorError) as error:
            raise AmclipError(
                f"{folder}/{name}.safetensors cannot be written: {error}; the checkpoint of step {step} is committed:"
                f" started again, the run writes its weights"
            ) from None


def set_weights_aside(folder: Path) -> list[Path]:
    """Those of an end that the run continues from, or of another run before it: until its next end, a run has the
    weights of its newest checkpoint, whoever asks for them. Rank 0 only. Returns their new paths. Raises AmclipError.
    """
    try:
        found = [path for name in ("student", "teacher") if (path := folder / f"{name}.safetensors").is_file()]
        return [set_aside(path, SUPERSEDED) for path in found]
    except OSError as error:
        raise not_written(f"run.out: {folder}", error) from None


def write_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes named fp32 weights as one safetensors file, old or new in any case, durable on return: exit.json says 0
    next. Rank 0 only."""
    partial = path.with_name(f".{path.name}.partial")
    with removed_on_error(partial):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        _sort_metadata(partial)
        sync(partial)
        partial.replace(path)
    sync(path.parent)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in a random order; sorted, the same weights are the same bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
