"""Loads: find -> verify every byte, on all ranks together -> check that it fits -> only then touch the state.

    found = load.find(checkpoints, "auto", fallback=False, ranks=ranks)      # None: a fresh start
    load.fill(found, state, ranks)                                           # writes into the state's own tensors

Any world size and ZeRO stage: a rank reads the elements it holds, wherever they are in the files.
"""

import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from amclip_ds import run_files
from amclip_ds.checkpoint import manifest, step_folders, tensorfile
from amclip_ds.checkpoint.manifest import Manifest, PieceIndex
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.state import CheckpointState, set_random_state
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.engine.shards import Shard
from amclip_ds.errors import AmclipError, NotRead, UserError
from amclip_ds.files import OF_THE_MACHINE, describe, mode_at, not_read, outlasting, read_bytes
from amclip_ds.model.names import present_buffer, present_name

T = TypeVar("T")
Failure = DamagedError | AmclipError
"""Of what is read here: the checkpoint's own, or the file system's, which is outlasted and never taken for damage."""


@dataclass
class FoundCheckpoint:
    """A checkpoint of which every byte was verified."""

    path: Path
    manifest: Manifest
    index: PieceIndex
    small: dict[str, Any]
    """counters, data cursor, guards, as they were saved"""
    config: str
    """config.yaml of the run that saved it"""
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """what was met on the way: (kind, cause, action), for incidents.jsonl"""

    @property
    def moments(self) -> set[str]:
        """The kinds that are the optimizer's; none where it had not stepped yet."""
        return self.manifest.tensors.keys() - manifest.FOLDER_OF_KIND.keys()


def find(checkpoints: Path, resume: str, fallback: bool, ranks: Ranks) -> FoundCheckpoint | None:
    """The checkpoint to resume from, verified; None for a fresh start. Collective: every rank must call.

    resume: never | auto (fresh only if there is no checkpoint folder at all) | a path: a checkpoint, a run's folder or
    its checkpoints. fallback: whether auto may take an older one where the newest is damaged. Raises UserError, naming
    the file, on every rank, and AmclipError (code 1) where the file system fails for minutes.
    """
    if resume == "never":
        return None
    folder = checkpoints if resume == "auto" else Path(resume)
    listed, failure = ranks.from_main(_read(folder, lambda: _list_candidates(folder)) if ranks.is_main else None)
    _raise_first([failure])
    candidates, notes, problem = listed
    if problem is not None and not (resume == "auto" and fallback):
        raise UserError(problem + (_FIX if resume == "auto" else ""))
    if problem is not None:
        notes = [*notes, ("checkpoint_fallback", problem, "takes the newest checkpoint that is there")]
    if not candidates:
        if resume == "auto" and problem is None:
            return None
        raise UserError(problem or f"--resume {resume}: there is no checkpoint (step_XXXXXXXX with a {manifest.NAME})")
    for path in reversed(candidates):
        try:
            found = verified(path, ranks)
        except DamagedError as error:
            if not (resume == "auto" and fallback):
                raise UserError(f"damaged checkpoint: {error}" + (_FIX if resume == "auto" else "")) from None
            notes = [*notes, ("checkpoint_fallback", f"damaged checkpoint: {error}", "takes the one before it")]
            continue
        found.notes = notes
        return found
    raise UserError(f"{checkpoints}: every checkpoint is damaged; the last one tried: {notes[-1][1]}")


_FIX = "; checkpoint.fallback=true resumes from the newest valid one, --resume PATH from another"


def _read(path: Path, work: Callable[[], T]) -> tuple[T | None, Failure | None]:
    """What `work` reads at that path, or the failure that all ranks must hear of."""
    try:
        return outlasting(str(path), work), None
    except (DamagedError, AmclipError) as error:
        return None, error


def _list_candidates(folder: Path) -> tuple[list[Path], list[tuple[str, str, str]], str | None]:
    """Raises NotRead, OSError of the machine alone: what else keeps the list from being read is its third part."""
    try:
        return _candidates(folder)
    except NotRead:
        raise
    except UserError as error:
        return [], [], str(error)
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        return [], [], f"{error.filename or folder}: cannot be read: {error.strerror}"


def _candidates(folder: Path) -> tuple[list[Path], list[tuple[str, str, str]], str | None]:
    """Checkpoints oldest first, what was odd, and what makes the newest doubtful. Rank 0 only."""
    if step_folders.STEP_FOLDER.fullmatch(folder.resolve().name) or mode_at(folder / manifest.NAME):
        return ([folder] if stat.S_ISDIR(mode_at(folder)) else []), [], None
    if stat.S_ISDIR(mode_at(folder / run_files.CHECKPOINTS)):
        folder = folder / run_files.CHECKPOINTS
    steps = step_folders.list_steps(folder)
    paths = [path for _, path in steps]
    hint = folder / "latest"
    try:
        name = read_bytes(hint, 200, follow=False).decode(errors="replace").strip()
    except FileNotFoundError:
        return paths, [], None
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        return paths, [("checkpoint_latest", f"{hint}: {describe(error)}", _newest_of(paths))], None
    match = step_folders.STEP_FOLDER.fullmatch(name)
    if match and stat.S_ISDIR(mode_at(folder / name)):
        return paths, [], None
    newest = _newest_of(paths)
    if match and (not steps or int(match[1]) > steps[-1][0]):
        return paths, [], f"{hint}: names {name}, which is gone; {newest}"
    cause = f"{hint}: {'empty' if not name else f'names {name[:80]!r}, which is no checkpoint here'}"
    return paths, [("checkpoint_latest", cause, newest)], None


def _newest_of(paths: list[Path]) -> str:
    return f"the newest checkpoint is {paths[-1].name}" if paths else "there is no checkpoint"


def verified(path: Path, ranks: Ranks) -> FoundCheckpoint:
    """Checks everything: rank 0 what the folder says of itself, all ranks together what its files hold, each file read
    by one of them. So the work on a shared file system grows with the files, not with files times ranks.

    Raises DamagedError on every rank, of the first problem, AmclipError for trouble of the file system that lasts.
    Collective: every rank must call.
    """
    described, failure = ranks.from_main(_read(path, lambda: _describe(path)) if ranks.is_main else None)
    _raise_first([failure])
    held: Manifest = described[0]
    largest_first = sorted(held.files, key=lambda name: (-held.files[name]["bytes"], name))
    own = largest_first[ranks.rank :: ranks.world_size]
    answers = ranks.gather(_read_each(path, own, partial(_read_pieces, path)))
    _raise_first([failure for _, failure in answers])
    index = PieceIndex(path, held, [piece for found, _ in answers for pieces in found for piece in pieces])
    _, failure = _read_each(path, own, partial(manifest.check_hash, path, held))
    _raise_first(ranks.gather(failure))
    return under_present_names(FoundCheckpoint(path, held, index, *described[1:]))


def _describe(path: Path) -> tuple[Manifest, dict[str, Any], str]:
    """Manifest, counters and settings, with every file there and of its size. Raises DamagedError, NotRead."""
    held = manifest.read(path)
    manifest.check_sizes(path, held)
    return held, manifest.read_trainer(path, held), manifest.read_config(path)


def _read_each(path: Path, names: list[str], work: Callable[[str], T]) -> tuple[list[T], Failure | None]:
    """What `work` reads of each file, up to the first failure, and that. A file at a time, so that trouble of the file
    system costs no hour's reading."""
    done: list[T] = []
    for name in names:
        found, failure = _read(path / name, partial(work, name))
        if failure is not None:
            return done, failure
        done.append(found)  # type: ignore[arg-type]
    return done, None


def _read_pieces(path: Path, name: str) -> manifest.Pieces:
    pieces = manifest.read_pieces(path, name)
    manifest.check_random(path, name)
    return pieces


def under_present_names(found: FoundCheckpoint) -> FoundCheckpoint:
    """The checkpoint with the names that an older version gave replaced by those of today."""
    held = found.manifest
    tensors = {
        kind: {present_name(name): count for name, count in names.items()} for kind, names in held.tensors.items()
    }
    shapes = {present_name(name): shape for name, shape in held.shapes.items()}
    found.index.pieces = {(kind, present_name(name)): at for (kind, name), at in found.index.pieces.items()}
    return replace(found, manifest=replace(held, tensors=tensors, shapes=shapes))


def _raise_first(failures: list[Failure | None]) -> None:
    """The failures are every rank's, as each rank knows them."""
    for failure in failures:
        if isinstance(failure, AmclipError):
            failure.is_shared = True
        if failure is not None:
            raise failure


def fill(found: FoundCheckpoint, state: CheckpointState, ranks: Ranks) -> None:
    """Writes the checkpoint's values into the state's tensors, after checking that all of them fit.

    Raises UserError, on every rank, where the checkpoint is of another model or optimizer, or cannot be read any more,
    AmclipError for trouble of the file system that lasts. Collective: every rank must call.
    """
    kinds: set[str] = set().union(*ranks.gather(set(state.sharded)))  # a rank may hold nothing of a kind
    if left := found.moments - kinds:
        raise UserError(f"{found.path}: of another optimizer: its {', '.join(sorted(left))} has no place here")
    buffers, failure = _read(found.path, lambda: _buffers_that_fit(found, state))
    _raise_as_user_error(ranks.gather(failure))
    assert buffers is not None
    _, failure = _read(found.path, lambda: _fill_all(found, state, *buffers))
    _raise_as_user_error(ranks.gather(failure))
    if ranks.world_size == found.manifest.world_size:
        _restore_random_state(found, ranks.rank)


def _buffers_that_fit(found: FoundCheckpoint, state: CheckpointState) -> tuple[dict[str, tensorfile.Entry], int]:
    """What is saved of the buffers, and where it begins. Raises DamagedError, UserError where the state is another."""
    entries, begin = tensorfile.read_header(found.path / manifest.REPLICATED)
    entries = {present_buffer(name): entry for name, entry in entries.items()}
    if problem := _misfit(found, state, entries):
        raise UserError(problem)
    return entries, begin


def _fill_all(found: FoundCheckpoint, state: CheckpointState, buffers: dict[str, tensorfile.Entry], begin: int) -> None:
    """Raises DamagedError, NotRead; then it may be called again: it opens and reads everything anew."""
    try:
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for kind, held in state.sharded.items():
                for name, shard in held.items():
                    _fill_shard(found, kind, name, shard, opened, stack)
            file = stack.enter_context(tensorfile.open_regular(found.path / manifest.REPLICATED))
            for name, buffer in state.replicated.items():
                tensorfile.read_elements(file, begin, buffers[name], 0, buffer.detach().view(-1))
    except DamagedError as error:
        raise DamagedError(f"{found.path}: cannot be read any more: {error}") from None
    except OSError as error:
        raise not_read(f"{found.path}: cannot be read any more: {error.filename}", error) from None


def _fill_shard(
    found: FoundCheckpoint, kind: str, name: str, shard: Shard, opened: dict[str, Any], stack: ExitStack
) -> None:
    out = shard.tensor.detach().view(-1)
    for piece in found.index.pieces[kind, name]:
        first, last = max(piece.start, shard.start), min(piece.start + piece.length, shard.start + shard.length)
        if first >= last:
            continue
        if piece.file not in opened:
            opened[piece.file] = stack.enter_context(tensorfile.open_regular(found.path / piece.file))
        target = out[first - shard.start : last - shard.start]
        tensorfile.read_elements(opened[piece.file], piece.begin, piece.entry, first - piece.start, target)


def _misfit(found: FoundCheckpoint, state: CheckpointState, buffers: dict[str, tensorfile.Entry]) -> str | None:
    """Why the checkpoint does not fit this state; None where it does."""
    saved, shapes = found.manifest.tensors, found.manifest.shapes
    differences = [
        f"{name} {shapes.get(name, 'absent')} -> {state.shapes.get(name, 'absent')}"
        for name in sorted(shapes.keys() | state.shapes.keys())
        if shapes.get(name) != state.shapes.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        return f"{found.path}: of another model: {'; '.join(differences[:5])}{more}"
    for kind, held in state.sharded.items():
        for name, shard in held.items():
            numel = saved.get(kind, {}).get(name)
            if numel != shard.numel:
                what = "none" if numel is None else f"{numel} elements"
                return f"{found.path}: of another run: {kind} of {name} has {shard.numel} elements here, {what} there"
    for name, buffer in state.replicated.items():
        if name not in buffers or buffers[name].shape != tuple(buffer.shape):
            return f"{found.path}: of another model: the buffer {name} {list(buffer.shape)} is not in it"
    return None


def _raise_as_user_error(failures: list[Failure | None]) -> None:
    try:
        _raise_first(failures)
    except DamagedError as error:
        raise UserError(str(error)) from None


def _restore_random_state(found: FoundCheckpoint, rank: int) -> None:
    """Gives this rank its generators back, at the same world size; nothing of a run depends on them."""
    path = found.path / f"rng/rank{rank:04d}.json"
    try:
        set_random_state(outlasting(str(path), lambda: manifest.read_json(path)))
    except (DamagedError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: not a random state: {error}") from None
