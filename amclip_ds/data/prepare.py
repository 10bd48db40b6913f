"""Before the stream: which shards there are, and an index that fits them, found or made once for all ranks."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from amclip_ds.data.config import DataConfig
from amclip_ds.data.train_sources import training_sources
from amclip_ds.errors import NotRead, UserError
from amclip_ds.files import mode_at, outlasting
from amclip_ds.processes import num_cores
from amclip_ds.progress import progress
from amclip_ds.redact import redact
from amclip_ds.shards.changes import changed_shards
from amclip_ds.shards.index import Index, ShardEntry, build_index, default_folder, name_of
from amclip_ds.shards.inputs import INDEX

T = TypeVar("T")
Once = Callable[[Callable[[], T]], T]
MANY_SHARDS = 32  # from here on, starting processes to index them pays
BUILD_REPORTS_EVERY_S = 30.0


@dataclass(frozen=True)
class Sources:
    """The shards of a run and where their index is, found and checked once for all ranks."""

    shards: list[str]
    source_of_shard: list[int]
    index: str


def find_sources(
    config: DataConfig,
    say: Callable[[str], None],
    once: Once,
    index_dir: str | Path | None = None,
    resumes: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> Sources:
    """The shards, checked, with an index that fits them, made where it is missing. Raises UserError.

    on_progress: called on every rank now and then, as long as one shard after another is read.
    """
    builder: list[_Background] = []
    progressed = threading.Event()

    def find_sources() -> tuple[Sources | None, bool]:
        """On one rank; answers now and then, so that no rank waits longer than a collective may take. Whether a shard
        was read since the answer before, too."""
        if not builder:
            builder.append(
                _Background(
                    lambda: _find_sources(config, lambda text: say(redact(text)), index_dir, resumes, progressed.set)
                )
            )
        found = builder[0].result(BUILD_REPORTS_EVERY_S)
        is_progress = progressed.is_set()
        progressed.clear()
        return found, is_progress

    sources = None
    while sources is None:
        sources, is_progress = once(find_sources)
        if is_progress:
            on_progress()
    return sources


class _Background:
    """A work done in a thread; `result` waits a while for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._outcome: list[Any] = []
        self._error: list[BaseException] = []

        def run() -> None:
            try:
                self._outcome.append(work())
            except BaseException as error:
                self._error.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self, timeout_s: float) -> Any:
        """The work's result, None if it is not done yet; raises what it raised."""
        self._thread.join(timeout_s)
        if self._error:
            raise self._error[0]
        return self._outcome[0] if self._outcome else None


def _find_sources(
    config: DataConfig,
    say: Callable[[str], None],
    index_dir: str | Path | None,
    resumes: bool,
    on_shard: Callable[[], None],
) -> Sources:
    found = training_sources(config)
    shards = [shard for part in found for shard in part]
    source_of_shard = [number for number, part in enumerate(found) for _ in part]
    return Sources(shards, source_of_shard, str(_find_index(config, shards, say, index_dir, resumes, on_shard)))


def _find_index(
    config: DataConfig,
    shards: list[str],
    say: Callable[[str], None],
    index_dir: str | Path | None,
    resumes: bool,
    on_shard: Callable[[], None],
) -> Path:
    """The folder of an index that fits the shards as they are now. Raises UserError, also where shards have changed
    that a checkpoint was trained on and data.on_change refuses it."""
    once_each = tuple(dict.fromkeys(shards))
    beside = default_folder(once_each)
    refuses = resumes and config.on_change == "refuse"
    if config.index:
        places = order = [Path(config.index)]
    else:
        places = [Path(folder) / beside.name for folder in (index_dir, beside.parent, Path.cwd()) if folder]
        found = [folder for place in places for folder in (place, place.with_name(name_of(once_each)))]
        order = found if resumes else [beside, *found]  # what the checkpoint was trained on is the run's own first
    stale: list[str] = []
    broken: list[str] = []
    for place in dict.fromkeys(order):
        try:
            index = _index_at(place)
        except NotRead:
            raise
        except UserError as error:  # a purge may take one file of it; that says nothing of the shards
            broken.append(str(error))
            continue
        if index is None:
            continue
        why = stale_index(index, list(once_each), on_shard)
        if not why:
            return place
        if config.index:
            raise UserError(f"data.index: {why}; make it again: amclip data index --out {config.index}")
        stale.append(why)
        if refuses and place.parent == places[0].parent:
            break
    if stale and refuses and not broken:
        raise UserError(
            f"data.train: {stale[0]}; the checkpoint was trained on what it was: put that back, or start a new"
            f" run; data.on_change=report continues with what there is now"
        )
    for why in (*stale, *broken):
        say(f"data: {why.removeprefix('data.index: ')}; the index is made again")
    usable = [place for place in places if _writable(place.parent)]
    if not usable:
        raise UserError(f"data.index: no index, and {places[0].parent} cannot be written; set data.index to a folder")
    _build(list(once_each), usable[0], num_cores() if len(once_each) >= MANY_SHARDS else 1, say, on_shard)
    return usable[0]


def _index_at(place: Path) -> Index | None:
    """The index in a folder; None where there is none. Raises UserError for one that cannot be opened, its subclass
    NotRead where that is the file system's fault."""
    if not mode_at(place / "meta.json", f"data.index: {place}"):
        return None
    return outlasting(f"data.index: {place}", lambda: Index(place))


def stale_index(index: Index, shards: list[str], on_shard: Callable[[], None]) -> str:
    """Why an index does not fit these shards as they are now; empty if it does."""
    try:
        processes = num_cores() if len(shards) >= MANY_SHARDS else 1
        stale = changed_shards(index, shards, index.find(shards), processes, on_shard)
    except NotRead:
        raise
    except UserError as error:
        return str(error).removeprefix("data.index: ")
    if not stale:
        return ""
    path, what, detail = stale[0]
    return f"{path}: {what}{and_more(stale)}" + (f": {detail}" if detail else "")


def _build(
    shards: list[str], folder: Path, processes: int, say: Callable[[str], None], on_shard: Callable[[], None]
) -> None:
    """Builds the index, printing its progress. Raises UserError for a shard that cannot be read at all."""
    with progress(f"data: indexing {len(shards)} shard(s)", len(shards), say) as advance:

        def report(entry: ShardEntry) -> None:
            advance()
            on_shard()

        index = build_index(shards, folder, processes, report)
    unreadable = [s for s in index.shards if any(problem["kind"] == "unreadable" for problem in s.problems)]
    if unreadable:
        for name in INDEX:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        raise UserError(
            f"data.train: {unreadable[0].path} cannot be read: {unreadable[0].problems[0]['key']}{and_more(unreadable)}"
        )
    damaged = [shard for shard in index.shards if shard.problems]
    say(
        f"data: indexed {len(index)} samples in {len(shards)} shard(s) -> {folder}"
        + (f"; {len(damaged)} shard(s) have damage, `amclip data check` shows what" if damaged else "")
    )


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def and_more(listed: list[Any]) -> str:
    """What is reported behind the first of several: ' (and N more)', or nothing."""
    return f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
