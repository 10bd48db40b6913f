"""`amclip watch`: evaluates each committed checkpoint of a run once, beside the training.

RUN/eval.jsonl is its whole memory: a checkpoint is done when a row for each data set and each of its weights is there
there. So it may be killed and started at any time, and a checkpoint that a resumed run writes again, whose rows the
resume has set aside, is evaluated again. Only folders that appeared by the saver's rename and whose files verify are
read; while it reads one, a pin keeps the run from deleting it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import torch

from amclip_ds import config as settings
from amclip_ds import jsonl, run_files
from amclip_ds.checkpoint import manifest, retention, step_folders
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.comm import SingleProcess
from amclip_ds.config import TrainConfig
from amclip_ds.errors import TO_REQUEUE, AmclipError, NotRead, UserError
from amclip_ds.evaluate import rows
from amclip_ds.evaluate.datasets import EvalSet, open_sets
from amclip_ds.evaluate.source import locate, open_encoder
from amclip_ds.evaluate.tasks import run_task
from amclip_ds.files import read_bytes
from amclip_ds.method import method_of
from amclip_ds.record import is_by_file, read_verdict
from amclip_ds.shards.sources import split_sources

PIN = "pinned by amclip watch\n"  # what earlier versions wrote into a pin under a person's name
LONGEST_LOAD_S = 3600.0
ROUNDS_AFTER_THE_END = 20  # in which the disk may be well again; it must not keep a job's GPU for ever
Failed = dict[tuple[tuple[Path, int], str, str], str]  # (a checkpoint's identity, weights, set) -> why


def watch(run: Path, data: list[str] | None, weights: str, batch_size: int, every_s: float, once: bool) -> int:
    """Returns 0 when the run has ended and nothing is left to evaluate. Raises UserError."""
    _wait_for(run, every_s, once)
    rows_file = run / run_files.EVALUATIONS
    if not os.access(rows_file if rows_file.exists() else run, os.W_OK):  # or it would evaluate, in vain, for ever
        raise UserError(f"{rows_file}: not yours to write; `amclip eval CHECKPOINT --no-append` evaluates one")
    config = settings.load_run(run / run_files.CONFIG)
    if weights == "teacher" and not method_of(config).needs_teacher:
        raise UserError(f"--weights teacher: {run} keeps none; leave it out, or --weights student")
    if not data and not config.eval.data:
        raise UserError("--data: name a data set; the run has no eval.data")
    sets = open_sets(data or split_sources(config.eval.data or ""), "watch --data" if data else "eval.data")
    for one in sets:
        print(one.describe(), flush=True)
    _remove_stale_pins(run)
    refused: set[tuple[Path, int]] = set()
    failed: Failed = {}
    is_idle, unreadable, rounds_left = False, 0, ROUNDS_AFTER_THE_END
    while True:
        has_ended = _has_ended(run)  # asked before the listing: what was committed until then is seen by it
        rounds_left -= has_ended
        is_last = once or rounds_left == 0
        listed, in_trouble = [], False
        try:
            unreadable = _report_unreadable(rows_file, unreadable)
            listed = step_folders.list_steps(run / run_files.CHECKPOINTS)
        except NotRead as fault:
            in_trouble = _try_again(run, fault, is_last, every_s)
        for step, path in listed:
            identity = _identity(path)
            if identity is None or identity in refused:
                continue
            try:
                if not retention.is_whole(path):
                    continue
                missing = _untried(rows.missing(run, step, sets, _wanted(path, weights)), identity, failed)
                if not missing or _left_to_training(config, run, step, sets, has_ended):
                    continue
            except NotRead as fault:
                in_trouble = _try_again(path, fault, is_last, every_s)
                continue
            except DamagedError:  # gone since it was listed
                continue
            is_idle = False
            try:
                for (name, dataset), error in _evaluate(run, path, missing, batch_size).items():
                    failed[identity, name, dataset] = error
            except NotRead as fault:
                in_trouble = _try_again(path, fault, is_last, every_s)
            except UserError as damage:
                if _identity(path) == identity:  # damaged, not just deleted meanwhile
                    print(f"{path.name}: {damage}", flush=True)
                    refused.add(identity)
            except AmclipError as fault:
                in_trouble = _try_again(path, fault, is_last, every_s)
        if once or (has_ended and not in_trouble):
            break
        if not is_idle:
            print(f"waiting for the next checkpoint in {run / 'checkpoints'} (Ctrl-C ends this)", flush=True)
        is_idle = True
        time.sleep(every_s)
    if failed:
        raise UserError(f"{len(failed)} evaluations could not be made, the first: {next(iter(failed.values()))}")
    return 0


def _try_again(path: Path, fault: AmclipError, is_last: bool, every_s: float) -> bool:
    """Of a fault of the disk, which may be well at the next round: true. Raises it where there is none."""
    if is_last:
        raise fault
    print(f"{path.name}: {fault}; tried again in {every_s:g} s", flush=True)
    return True


def _report_unreadable(file: Path, reported: int) -> int:
    """How many lines of eval.jsonl are no rows: what they record is evaluated again. Said once for each number."""
    count = jsonl.read(file, run_files.EVALUATION)[1]
    for line in jsonl.left_out(file, count) if count != reported else ():
        print(line, flush=True)
    return count


def _untried(missing: dict[str, list[EvalSet]], identity: tuple[Path, int], failed: Failed) -> dict[str, list[EvalSet]]:
    """Those that have not failed before."""
    left = {name: [one for one in sets if (identity, name, one.name) not in failed] for name, sets in missing.items()}
    return {name: some for name, some in left.items() if some}


def _evaluate(run: Path, path: Path, missing: dict[str, list[EvalSet]], batch_size: int) -> dict[tuple[str, str], str]:
    """Appends a checkpoint's missing rows; {weights: sets}. Returns and prints what failed: (weights, set) -> why.

    Raises UserError where the checkpoint cannot be read.
    """
    failures: dict[tuple[str, str], str] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, sets in missing.items():
        with _pinned(path):
            located = locate(path)
            encoder = open_encoder(located, name, device)
            encoder.say = partial(print, flush=True)
        for data in sets:
            began = time.monotonic()
            try:
                row = run_task(data.task, encoder, data, batch_size, SingleProcess(), located.step)
            except UserError as error:
                failures[name, data.name] = str(error)
                print(f"{path.name} {name} {data.name}: {error}", flush=True)
                continue
            rows.append_new(run, [row])
            metric = next(iter(row["metrics"]))
            value, seconds = row["metrics"][metric], time.monotonic() - began
            print(f"{path.name} {name} {row['dataset']}: {metric} {value:.4f} ({seconds:.1f} s)", flush=True)
    return failures


def _wanted(path: Path, weights: str) -> list[str]:
    """The weights that the checkpoint holds and that were asked for."""
    held = ["student", "teacher"] if manifest.read(path).tensors.get("ema") else ["student"]
    return [name for name in held if weights in ("both", name)]


def _left_to_training(config: TrainConfig, run: Path, step: int, sets: list[EvalSet], has_ended: bool) -> bool:
    """Whether the run itself evaluates these sets at that step and may not have come to it yet."""
    own = set(split_sources(config.eval.data or ""))
    every = config.eval.every_steps
    is_due = step == config.run.steps or (every is not None and step % every == 0)
    is_newest = step == max((other for other, _ in step_folders.list_steps(run / run_files.CHECKPOINTS)), default=step)
    return is_due and is_newest and not has_ended and bool(own & {data.folder for data in sets})


def _has_ended(run: Path) -> bool:
    """Whether the run has left a verdict other than that it will be requeued."""
    verdict = read_verdict(run)
    return verdict is not None and (verdict["code"] != TO_REQUEUE or is_by_file(verdict))


def _wait_for(run: Path, every_s: float, once: bool) -> None:
    """Waits for a run that has not begun, and says so. Raises UserError where none can come to be."""
    config = run / run_files.CONFIG
    above = run.absolute().parent
    if not above.is_dir() or (run.exists() and not run.is_dir()):
        raise UserError(
            f"{run}: {'not a folder' if run.exists() else f'missing, and so is {above}'}; name a run's folder"
        )
    if run_files.runs_near(run) and not config.is_file() or (run / run_files.MANIFEST).exists():
        run_files.check_is_run(run)
    if not config.is_file() and not once:
        print(f"waiting for {config}: the run has not begun (Ctrl-C ends this)", flush=True)
    while not config.is_file():
        if once:
            raise UserError(f"{config}: missing; is {run} a run's folder?")
        time.sleep(every_s)


def _identity(path: Path) -> tuple[Path, int] | None:
    """What distinguishes a checkpoint from another of the same step; None where it is gone."""
    try:
        return path, (path / manifest.NAME).stat().st_mtime_ns
    except OSError:
        return None


@contextlib.contextmanager
def _pinned(path: Path) -> Iterator[None]:
    """Keeps the run from deleting a checkpoint. A person's pin and those of other watches are files of their own."""
    pin = path / f"{retention.HELD}{socket.gethostname()}-{os.getpid()}"
    with contextlib.suppress(OSError):  # gone, or a folder that we may only read
        pin.touch()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            pin.unlink()


def _remove_stale_pins(run: Path) -> None:
    """Pins of watches that were killed."""
    for _, path in step_folders.list_steps(run / run_files.CHECKPOINTS):
        with contextlib.suppress(OSError):
            for pin in path.glob(f"{retention.PINNED}*"):
                if _is_stale(pin):
                    pin.unlink()


def _is_stale(pin: Path) -> bool:
    """Whether it is of a watch that has ended, here, or is older than any checkpoint takes to load. Raises OSError."""
    if not pin.name.startswith(retention.HELD) and read_bytes(pin, len(PIN)) != PIN.encode():
        return False  # a person's
    host, _, pid = pin.name.removeprefix(retention.HELD).rpartition("-")
    has_ended = host == socket.gethostname() and not psutil.pid_exists(int(pid))
    return has_ended or time.time() - pin.stat().st_mtime > LONGEST_LOAD_S
