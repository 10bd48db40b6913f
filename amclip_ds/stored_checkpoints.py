"""What `amclip checkpoints` does, without ranks: list, verify, prune, pin, consolidate, import."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclip_ds import config as settings
from amclip_ds import files, plain_yaml, run_files
from amclip_ds.checkpoint import CheckpointConfig, drift, manifest, retention, step_folders, tensorfile
from amclip_ds.checkpoint.manifest import Manifest, PieceIndex
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import Saver
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.compat import COMPAT
from amclip_ds.config import TrainConfig
from amclip_ds.engine.deepspeed_folder import DeepSpeedFolder, read_deepspeed_folder
from amclip_ds.engine.ds_config import read_ds_config
from amclip_ds.engine.shards import Shard
from amclip_ds.errors import UserError
from amclip_ds.method import method_of
from amclip_ds.model.amclip import AClip
from amclip_ds.model.init import persistent_buffers
from amclip_ds.model.teacher_model import TeacherModel, mirrored_names
from amclip_ds.objectives import builder


def rows(checkpoints: Path, deep: bool) -> list[dict[str, Any]]:
    """One row a checkpoint, oldest first: step, age_s, bytes, world_size, stage, pinned, valid, problem.

    deep: every byte is read and hashed; else manifest and sizes are checked.
    """
    return [_row(step, path, deep) for step, path in step_folders.list_steps(checkpoints)]


def _row(step: int, path: Path, deep: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "age_s": None,
        "bytes": None,
        "world_size": None,
        "stage": None,
        "precision": None,
        "attempt": None,
        "pinned": retention.is_pinned(path),
        "valid": False,
        "problem": "",
        "path": str(path),
    }
    try:
        held = manifest.read(path)
        row |= {
            "age_s": round(time.time() - held.time, 1),
            "bytes": sum(file["bytes"] for file in held.files.values()),
            "world_size": held.world_size,
            "stage": held.stage,
            "precision": held.precision,
            "attempt": held.attempt,
        }
        if deep:
            manifest.verify(path)
        else:
            manifest.check_sizes(path, held)
        row["valid"] = True
    except DamagedError as error:
        row["problem"] = str(error)
    return row


def folder_of(run: Path, is_new: bool = False) -> Path:
    """RUN/checkpoints; RUN may also be that folder itself. is_new: whether it may be no run yet. Raises UserError."""
    if (run / run_files.CHECKPOINTS).is_dir():
        return run / run_files.CHECKPOINTS
    if step_folders.list_steps(run):
        return run
    if (run / run_files.CHECKPOINTS).exists():
        raise UserError(f"{run}/checkpoints: not a folder")
    if not is_new or not run.is_dir() or (run / run_files.MANIFEST).exists():
        run_files.check_is_run(run)
    return run / run_files.CHECKPOINTS


def choose(checkpoints: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest whole one. Raises UserError."""
    steps = dict(step_folders.list_steps(checkpoints))
    if step is not None:
        if step not in steps:
            raise UserError(f"--step {step}: {checkpoints} has {', '.join(map(str, steps)) or 'no checkpoint'}")
        return steps[step]
    for path in reversed(steps.values()):
        if retention.is_whole(path):
            return path
    raise UserError(f"{checkpoints}: no whole checkpoint")


def prune(checkpoints: Path, config: CheckpointConfig, remove_damaged: bool, remove_aside: bool) -> list[Path]:
    """Removes what the run's rules do not keep. Returns what went. Raises UserError.

    remove_damaged: also those whose manifest or sizes are wrong, once a whole one is there. remove_aside: also what
    resumes set aside.
    """
    if checkpoints.is_symlink():
        raise UserError(f"{checkpoints}: a link out of the run; to prune there, name {checkpoints.resolve()}")
    steps = step_folders.list_steps(checkpoints)
    going = [path for _, path in retention.expired(checkpoints, config)]
    if remove_damaged and any(retention.is_whole(path) for _, path in steps):
        going += [path for _, path in steps if not retention.is_whole(path)]
    try:
        moved = [retention.set_aside(path, retention.DELETING) for path in going]
        aside = (
            retention.set_aside_as(checkpoints, retention.SUPERSEDED) if remove_aside and checkpoints.is_dir() else []
        )
        for path in [*moved, *aside]:
            retention.remove(path)
    except OSError as error:
        raise files.not_written(f"{error.filename or checkpoints}", error) from None
    return going + aside


def pin(path: Path, is_kept: bool) -> None:
    """Keeps a checkpoint for good, or no more. Raises UserError."""
    try:
        if is_kept:
            (path / retention.PINNED).touch()
        else:
            (path / retention.PINNED).unlink(missing_ok=True)
    except OSError as error:
        raise files.not_written(f"{path}", error) from None


class Weights:
    """The whole student or teacher of a verified checkpoint, tensor by tensor."""

    def __init__(self, path: Path, which: str) -> None:
        """which: student | teacher. Raises UserError where the checkpoint is damaged or has no teacher."""
        try:
            self.manifest = manifest.verify(path)
            self._index = PieceIndex(path, self.manifest)
            self._buffers, self._begin = tensorfile.read_header(path / manifest.REPLICATED)
        except DamagedError as error:
            raise UserError(f"damaged checkpoint: {error}") from None
        self._path, self._prefix = path, f"{which}."
        self._sources = _sources(path, self.manifest, which)

    def empty(self) -> dict[str, Tensor]:
        """Name -> a tensor without memory, of its shape and dtype."""
        shapes = {name: torch.Size(self.manifest.shapes[name]) for name in self._sources}
        found = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
        for name, entry in self._buffers.items():
            if name.startswith(self._prefix):
                short = name.removeprefix(self._prefix)
                found[short] = torch.empty(entry.shape, dtype=tensorfile.dtype_of(entry), device="meta")
        return found

    def read(self, name: str) -> Tensor:
        """One tensor; parameters in fp32."""
        if name not in self._sources:
            entry = self._buffers[self._prefix + name]
            out = torch.empty(entry.shape, dtype=tensorfile.dtype_of(entry))
            with tensorfile.open_regular(self._path / manifest.REPLICATED) as file:
                tensorfile.read_elements(file, self._begin, entry, 0, out.view(-1))
            return out
        out = torch.empty(self.manifest.shapes[name], dtype=torch.float32)
        for piece in self._index.pieces[self._sources[name], name]:
            with tensorfile.open_regular(self._path / piece.file) as file:
                part = out.view(-1)[piece.start : piece.start + piece.length]
                tensorfile.read_elements(file, piece.begin, piece.entry, 0, part)
        return out


def _sources(path: Path, held: Manifest, which: str) -> dict[str, str]:
    """Parameter -> the kind that holds it."""
    trained = dict.fromkeys(held.tensors.get("master", {}), "master")
    if which == "student":
        return trained | dict.fromkeys(held.tensors.get("frozen", {}), "frozen")
    if "ema" not in held.tensors:
        raise UserError(f"{path}: its run had no teacher")
    try:
        config = drift.flatten(files.read_text(path / "config.yaml", plain_yaml.MAX_BYTES, follow=False))
    except UserError as error:
        raise UserError(f"damaged checkpoint: {error}") from None
    published = COMPAT.get(config.get("compat", "paper"))
    if published is None:
        raise UserError(f"damaged checkpoint: compat: {config['compat']!r} is none of {', '.join(COMPAT)}")
    mirrored = mirrored_names(trained, published.averages_text_ends)
    return (
        dict.fromkeys(held.tensors["ema"], "ema")
        | dict.fromkeys(held.tensors.get("ema_frozen", {}), "ema_frozen")
        | dict.fromkeys(mirrored, "master")
    )


def consolidate(path: Path, out: Path, which: str) -> int:
    """Writes a checkpoint's student or teacher as one safetensors file; returns its bytes. Raises UserError.

    One tensor is in memory at a time.
    """
    weights = Weights(path, which)
    empty = weights.empty()
    metadata = {"format": "pt", "weights": which, "step": str(weights.manifest.step)}
    partial = out.with_name(f".{out.name}.partial")
    try:
        with files.removed_on_error(partial):
            with partial.open("wb") as file:
                file.write(tensorfile.build_header(empty, metadata))
                for name in empty:
                    file.write(tensorfile.bytes_of(weights.read(name)))
            partial.replace(out)
        return out.stat().st_size
    except OSError as error:
        raise files.not_written(f"--out {out}:", error) from None
    except DamagedError as error:
        raise UserError(f"{path}: {error}") from None


def import_deepspeed(source: Path, tag: str | None, checkpoints: Path, config: TrainConfig) -> tuple[Path, list[str]]:
    """Writes a checkpoint of ours from a DeepSpeed `save_checkpoint` folder. Runs the pickled code in that folder.

    config: of the run that shall resume from it. Returns the checkpoint and what to report. Raises UserError.
    """
    theirs, method = read_deepspeed_folder(source, tag), method_of(config)
    with torch.device("meta"):
        built = builder(method.objectives)
        module = AClip(config.model, built)
        teacher = TeacherModel(config.model, built) if method.needs_teacher else None
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    given = {name: list(value.shape) for kind in ("master", "frozen") for name, value in theirs.tensors[kind].items()}
    for name in sorted(shapes.keys() | given.keys()):
        if shapes.get(name) != given.get(name):
            here, there = shapes.get(name, "absent"), given.get(name, "absent")
            raise UserError(f"{source}: of another model: {name} is {there} there, {here} in the config")
    buffers = {name: theirs.buffers[name] for name in persistent_buffers(module) if name in theirs.buffers}
    missing = persistent_buffers(module).keys() - buffers.keys()
    if missing:
        raise UserError(f"{source}: of another model: it has no buffer {sorted(missing)[0]}")
    notes = ["the data begin at the start of an epoch: DeepSpeed keeps no place in them"]
    if teacher is not None:
        notes.append("the teacher begins as a copy of the student: DeepSpeed knows of no average")
    state = _state_of(theirs, shapes, buffers, teacher, config)
    if (checkpoints / step_folders.folder_name(theirs.global_steps)).exists():
        raise UserError(f"{checkpoints}: has a checkpoint of step {theirs.global_steps} already")
    save_config = CheckpointConfig(asynchronous=False, keep_last=10**9)
    with Saver(checkpoints, save_config, Ranks(), say=notes.append) as saver:
        saver.save(theirs.global_steps, state, wait=True)
    return checkpoints / step_folders.folder_name(theirs.global_steps), notes


def _state_of(
    theirs: DeepSpeedFolder,
    shapes: dict[str, list[int]],
    buffers: dict[str, Tensor],
    teacher: TeacherModel | None,
    config: TrainConfig,
) -> CheckpointState:
    sharded = {kind: {name: _whole(value) for name, value in held.items()} for kind, held in theirs.tensors.items()}
    replicated = {f"student.{name}": buffer for name, buffer in buffers.items()}
    if teacher is not None:
        names = [name for name, _ in teacher.named_parameters()]
        mirrored = mirrored_names(names, COMPAT[config.compat].averages_text_ends)
        sharded["ema"] = {n: sharded["master"][n] for n in names if n in sharded["master"] and n not in mirrored}
        sharded["ema_frozen"] = {n: sharded["frozen"][n] for n in names if n in sharded["frozen"]}
        replicated |= {f"teacher.{name}": buffers[name] for name in persistent_buffers(teacher)}
    step, updates = theirs.global_steps, theirs.global_steps - theirs.skipped_steps
    guards = {"window": [], "skipped_in_a_row": 0, "skipped": theirs.skipped_steps, "rewinds": 0}
    run = {
        "step": step,
        "updates": updates,
        "samples_seen": step * config.batch.global_size,
        "epoch": 0,
        "cursor": None,
        "guards": guards,
    }
    precision = "bfloat16" if read_ds_config(config.engine).get("bf16", {}).get("enabled") else "float32"
    return CheckpointState(
        sharded=sharded,
        shapes=shapes,
        replicated=replicated,
        stage=theirs.stage,
        precision=precision,
        config=settings.dump(config),
        small={
            "run": run,
            "optimizer": theirs.counters,
            "batch": asdict(settings.plan_batch(config.batch, theirs.world_size)),
        },
    )


def _whole(tensor: Tensor) -> Shard:
    flat = tensor.contiguous().view(-1)
    return Shard(flat, 0, flat.numel(), flat.numel())
