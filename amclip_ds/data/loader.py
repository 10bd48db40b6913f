"""The training stream: which samples a rank gets in which step, made by worker processes, as batches on the CPU.

Positions of an epoch (order.py) fall into global batches of `global_batch`; rank r of W takes the r-th of W equal
slices of each. A cursor {"epoch", "step"} in global batches is the whole state, so the stream goes on unbroken from any
batch, on any number of ranks and workers, and batches that were only prefetched are not lost.
"""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from amclip_ds.data import captions
from amclip_ds.data.ahead import made_ahead
from amclip_ds.data.batch import Batch
from amclip_ds.data.chunks import Chunk, ChunkMaker, ChunkSpec, Failed, join
from amclip_ds.data.index import Index, build_index, default_folder
from amclip_ds.data.order import EpochOrder, Mixture
from amclip_ds.data.parallel import num_cores
from amclip_ds.data.photometric import Photometric
from amclip_ds.data.progress import progress
from amclip_ds.data.reader import refuse_pipes_at_training
from amclip_ds.data.sources import expand, split_sources
from amclip_ds.data.tar import printable
from amclip_ds.errors import AmclipError, UserError

T = TypeVar("T")
Once = Callable[[Callable[[], T]], T]
STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # the run's own process decides what these mean
CHUNK = 64  # samples a worker makes at a time, at most
MANY_SHARDS = 32  # from here on, starting processes to index them pays
BUILD_TELLS_EVERY_S = 30.0
LOOK_AFTER_S = 5.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BUFFER = 1 << 17
CPU = torch.device("cpu")


@dataclass
class DataConfig:
    """What is trained on, and how it is read."""

    train: str = ""
    """SHARDS: a folder, a glob, braces ('/data/{00000..00099}.tar'), URLs; several sources joined by `::`."""
    index: str | None = None
    """Folder of the index that `amclip data index` made; null: looked for beside the shards, made where missing."""
    weights: list[float] | None = None
    """A number for each source in data.train: how often an epoch holds its samples (2.0: twice); empty: once each."""
    resampled: bool = False
    """True: whole shards are drawn with replacement, by weight, instead of each once an epoch."""
    workers: int = 4
    """Processes that read and decode for each rank; 0: the training process does it itself."""
    prefetch: int = 4
    """Chunks of up to 64 samples that each worker makes ahead."""
    timeout_s: float = 600.0
    """Without a sample for so long, the run ends with an error."""
    num_views: int = 2
    """Crops of each image for the student."""
    photometric: bool = True
    """Colour jitter, grayscale, blur and solarize on the views (never on the teacher's crop)."""
    captions: list[str] = field(default_factory=lambda: ["txt|json:captions|json:caption"])
    """Where captions are: `txt`, `json:FIELD`, a template such as '{title}. {text}', alternatives joined by `|`."""
    caption_per_line: bool = True
    """True: each line of a text member is a caption of its own, and one is drawn; False: the member is one caption."""
    text_bucket: int = 8
    """Texts are cut to the batch's longest, rounded up to a multiple of this; 0: always the full context."""
    open_shards: int = 16
    """Shards read side by side, so that neighbours in a batch come from different ones."""
    shuffle_window: int = 8192
    """Samples shuffled together; a shard is read from front to back, a window at a time."""
    max_pixels: int = 89_478_485
    """An image whose header tells more is refused before it is decoded."""
    max_skip_rate: float = 0.02
    """The run stops (code 3) when more than this part of the samples had to be replaced by others."""
    allow_pipe: bool = False
    """True: `pipe:COMMAND` sources may run a shell command (`amclip data index` and `check` alone; no training)."""
    stage_dir: str = ""
    """A node-local folder that shards are copied to before they are read; empty: they are read where they are."""
    stage_gb: float = 100.0
    """What the copies in data.stage_dir may take, in GB."""

    def __post_init__(self) -> None:
        at_least = {"workers": 0, "prefetch": 1, "num_views": 1, "text_bucket": 0, "open_shards": 1,
                    "shuffle_window": 1, "max_pixels": 1}  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: {getattr(self, name)} is below {least}")
        if not 0 <= self.max_skip_rate <= 1:
            raise ValueError(f"data.max_skip_rate: {self.max_skip_rate} is outside [0, 1]")
        if self.timeout_s <= 0:
            raise ValueError(f"data.timeout_s: {self.timeout_s} is not above 0")
        if not self.captions:
            raise ValueError("data.captions: names no source of captions")
        captions.check_sources(self.captions)
        if self.weights is not None and (not self.weights or min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"data.weights: {self.weights} needs numbers from 0, one of them above it")


@dataclass(frozen=True)
class Sources:
    """The shards of a run and where their index lies, found and checked once for all ranks."""

    shards: list[str]
    source_of_shard: list[int]
    index: str


class TrainingData:
    """One rank's part of the training stream.

    image_size, teacher_size: sides of the views and of the teacher's crop in pixels (None: no teacher looks).
    num_units: random numbers per view for the mask. compat: whose teacher box (boxes.py).
    once: does a work on rank 0 and gives every rank its result (engine.collectives.on_main), so that one rank alone
    looks at the shards and builds a missing index; without it every process does so by itself. Collective through it.
    index_dir: where a missing index is put (the run folder: others train on the same shards); None: beside the shards.
    device: where the batches go next; for a GPU, images lie in page-locked memory.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, global_batch: int, rank: int, world_size: int, image_size: int,
        teacher_size: int | None, num_units: int, context_length: int, compat: str,
        say: Callable[[str], None] = print, once: Once | None = None, index_dir: str | Path | None = None,
        device: torch.device = CPU,
    ) -> None:  # fmt: skip
        self._device = device
        self.config, self.global_batch = config, global_batch
        self._say = say if rank == 0 else lambda text: None
        self._local, rest = divmod(global_batch, world_size)
        if rest:
            raise UserError(f"batch.global_size: {global_batch} does not divide by {world_size} ranks")
        self._first = rank * self._local
        if config.workers:
            start_worker_server()
        sources = find_sources(config, say, once or (lambda work: work()), index_dir)
        self.shards = sources.shards
        self.index = index = Index(sources.index)
        members = index.find(sources.shards)
        mixture = _mixture(config, sources)
        self._spec = ChunkSpec(
            index=sources.index, paths=tuple(sources.shards), members=tuple(members), mixture=mixture, seed=seed,
            open_shards=config.open_shards, window=config.shuffle_window, num_views=config.num_views,
            image_size=image_size, teacher_size=teacher_size, num_units=num_units, context_length=context_length,
            compat=compat, photometric=config.photometric, sources=tuple(config.captions),
            per_line=config.caption_per_line, max_pixels=config.max_pixels, stage_dir=config.stage_dir,
            stage_bytes=int(config.stage_gb * 1e9),
        )  # fmt: skip
        self._known_damage = _damage(index, members) if rank == 0 else []
        counts = index.counts[members]
        self.samples_per_epoch = EpochOrder(counts, mixture, seed, 0, config.open_shards, config.shuffle_window).length
        self.steps_per_epoch = self.samples_per_epoch // global_batch
        self.fingerprint = self._fingerprint(index.fingerprint())
        self._check_enough()
        self._streams: list[Generator[Batch, None, None]] = []

    def batches(self, cursor: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Endless batches on the CPU. cursor: that of the last batch that was consumed; None: from the start."""
        stream = self._made(cursor)
        if self.config.workers:
            stream = made_ahead(stream, self._device)
        self._streams.append(stream)
        return stream

    def _made(self, cursor: dict[str, Any] | None) -> Generator[Batch, None, None]:
        epoch, step = (int(cursor["epoch"]), int(cursor["step"])) if cursor else (0, 0)
        if step >= self.steps_per_epoch:
            epoch, step = epoch + 1, 0
        pieces = -(-self._local // min(CHUNK, self._local))
        is_pinned = self._device.type == "cuda"
        incidents = list(self._known_damage) if cursor is None else []
        with contextlib.closing(self._chunks(epoch, step)) as stream:
            while True:
                made = [_good(next(stream)) for _ in range(pieces)]
                now, step = epoch, step + 1
                if step == self.steps_per_epoch:
                    epoch, step = epoch + 1, 0
                yield self._batch(join(made, is_pinned), now, {"epoch": epoch, "step": step}, incidents)
                incidents = []

    def close(self) -> None:
        """Ends the workers."""
        while self._streams:
            self._streams.pop().close()

    def _batch(self, chunk: Chunk, epoch: int, cursor: dict[str, Any], incidents: list[dict[str, str]]) -> Batch:
        return Batch(
            views_uint8=chunk.views, teacher_uint8=chunk.teacher, boxes=torch.from_numpy(chunk.boxes),
            photometric=Photometric(chunk.photometric), mask_noise=torch.from_numpy(chunk.noise),
            token_ids=captions.trim(torch.from_numpy(chunk.token_ids), self.config.text_bucket),
            sample_ids=torch.from_numpy(chunk.sample_ids), epoch=epoch, cursor=cursor,
            incidents=incidents + chunk.incidents, read_bytes=chunk.read_bytes,
        )  # fmt: skip

    def _places(self, epoch: int, step: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, start, stop) of this rank's chunks from a step on, without end."""
        size = min(CHUNK, self._local)
        while True:
            for batch in range(step, self.steps_per_epoch):
                start = batch * self.global_batch + self._first
                for first in range(start, start + self._local, size):
                    yield epoch, first, min(first + size, start + self._local)
            epoch, step = epoch + 1, 0

    def _chunks(self, epoch: int, step: int) -> Generator[Chunk | Failed, None, None]:
        if self.config.workers == 0:
            maker = ChunkMaker(self._spec)
            try:
                for place in self._places(epoch, step):
                    yield maker.make(*place)
            finally:
                maker.close()
            return
        loader = DataLoader(
            _Chunks(self._spec), batch_size=None, sampler=self._places(epoch, step), num_workers=self.config.workers,
            prefetch_factor=self.config.prefetch, multiprocessing_context="forkserver",
            timeout=min(LOOK_AFTER_S, self.config.timeout_s), worker_init_fn=_become_worker,
            generator=torch.Generator(),  # not the process's own, whose state a resume restores
        )  # fmt: skip
        stream = iter(loader)
        try:
            while True:
                yield self._received(stream)
        finally:
            _end_workers(stream)

    def _received(self, stream: Iterator[Chunk | Failed]) -> Chunk | Failed:
        """The next chunk. Looks after the workers now and then: torch sees a dead one only when a wait runs out."""
        deadline = time.monotonic() + self.config.timeout_s
        while True:
            try:
                return next(stream)
            except (RuntimeError, OSError, EOFError) as error:  # a worker died, or a wait ran out
                cause = str(error).splitlines()[0] if str(error) else type(error).__name__
                if "timed out" not in cause:
                    return Failed(
                        AmclipError(f"data.train: a worker process died ({cause}); no memory, or /dev/shm full")
                    )
                if time.monotonic() > deadline:
                    limit = f"data.timeout_s={self.config.timeout_s:g} s"
                    return Failed(AmclipError(f"data.train: no sample came within {limit}"))

    def _fingerprint(self, samples: str) -> str:
        """What the order follows from, apart from the seed: the same value, the same sequence of samples."""
        facts = [samples, self.global_batch, self._spec.open_shards, self._spec.window, list(self._spec.members),
                 self._spec.mixture.source_of_shard.tolist(), self._spec.mixture.weights,
                 self._spec.mixture.with_replacement]  # fmt: skip
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def _check_enough(self) -> None:
        if self.samples_per_epoch == 0:
            raise UserError(f"data.train: no sample with an image in {self.shards[0]}{_and_more(self.shards)}")
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.train: an epoch has {self.samples_per_epoch} samples, batch.global_size needs"
                f" {self.global_batch}; give more data or a smaller batch"
            )
        tail = self.samples_per_epoch - self.steps_per_epoch * self.global_batch
        if tail:
            self._say(f"data: {self.samples_per_epoch} samples an epoch; the last {tail} of each epoch's order are left"
                      f" out, which do not fill a batch of {self.global_batch}")  # fmt: skip


def find_sources(
    config: DataConfig, say: Callable[[str], None], once: Once, index_dir: str | Path | None = None
) -> Sources:
    """The shards, checked, with an index that fits them, made where it is missing. Raises UserError."""
    builder: list[_Background] = []

    def look() -> Sources | None:
        """On one rank; answers now and then, so that no rank waits longer than a collective may take."""
        if not builder:
            builder.append(_Background(lambda: _find_sources(config, say, index_dir)))
        return builder[0].result(BUILD_TELLS_EVERY_S)

    while (sources := once(look)) is None:
        pass
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


def _find_sources(config: DataConfig, say: Callable[[str], None], index_dir: str | Path | None) -> Sources:
    parts = split_sources(config.train)
    if not parts:
        raise UserError("data.train: names no shards; give a folder, a glob or '/data/{00000..00099}.tar'")
    if config.weights is not None and len(config.weights) != len(parts):
        raise UserError(f"data.weights: {len(config.weights)} numbers for {len(parts)} sources in data.train")
    shards, source_of_shard = [], []
    for number, part in enumerate(parts):
        found = expand(part, "data.train", config.allow_pipe)
        shards += found
        source_of_shard += [number] * len(found)
    refuse_pipes_at_training(shards)
    return Sources(shards, source_of_shard, str(_find_index(config, shards, say, index_dir)))


def _find_index(
    config: DataConfig, shards: list[str], say: Callable[[str], None], index_dir: str | Path | None
) -> Path:
    """The folder of an index that fits the shards as they are now."""
    once_each = tuple(dict.fromkeys(shards))
    beside = default_folder(once_each)
    if config.index:
        if (Path(config.index) / "meta.json").exists():
            stale = stale_index(Path(config.index), list(once_each))
            if stale:
                raise UserError(f"data.index: {stale}; make it again: amclip data index --out {config.index}")
            return Path(config.index)
        places = [Path(config.index)]
    else:
        places = [Path(folder) / beside.name for folder in (index_dir, beside.parent, Path.cwd()) if folder]
        for place in (beside, *places):
            if (place / "meta.json").exists():
                stale = stale_index(place, list(once_each))
                if not stale:
                    return place
                say(f"data: {stale}; the index is made again")
    usable = [place for place in places if _writable(place.parent)]
    if not usable:
        raise UserError(f"data.index: no index, and {places[0].parent} cannot be written; set data.index to a folder")
    _build(list(once_each), usable[0], num_cores() if len(once_each) >= MANY_SHARDS else 1, say)
    return usable[0]


def stale_index(folder: Path, shards: list[str]) -> str:
    """Why an index does not fit these shards as they are now; empty if it does."""
    try:
        index = Index(folder)
        stale = index.stale_shards(shards, index.find(shards))
    except UserError as error:
        return str(error).removeprefix("data.index: ")
    return f"{stale[0]}{_and_more(stale)}" if stale else ""


def _build(shards: list[str], folder: Path, processes: int, say: Callable[[str], None]) -> None:
    """Builds the index, telling its progress. Raises UserError for a shard that cannot be read at all."""
    with progress(f"data: indexing {len(shards)} shard(s)", len(shards), say) as advance:
        index = build_index(shards, folder, processes, lambda entry: advance())
    unreadable = [s for s in index.shards if any(problem["kind"] == "unreadable" for problem in s.problems)]
    if unreadable:
        for name in ("meta.json", "samples.bin", "keys.bin"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        raise UserError(f"data.train: {unreadable[0].path} cannot be read: {unreadable[0].problems[0]['key']}"
                        f"{_and_more(unreadable)}")  # fmt: skip
    damaged = [shard for shard in index.shards if shard.problems]
    say(f"data: indexed {len(index)} samples in {len(shards)} shard(s) -> {folder}"
        + (f"; {len(damaged)} shard(s) have damage, `amclip data check` tells what" if damaged else ""))  # fmt: skip


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _mixture(config: DataConfig, sources: Sources) -> Mixture:
    num_sources = max(sources.source_of_shard) + 1
    weights = tuple(config.weights) if config.weights is not None else (1.0,) * num_sources
    return Mixture(np.array(sources.source_of_shard), weights, config.resampled)


def _damage(index: Index, members: list[int]) -> list[dict[str, str]]:
    """What indexing found in the shards of this run, as incidents: members that no sample order can reach."""
    return [
        {"kind": problem["kind"], "shard": index.shards[number].path, "key": printable(problem["key"]),
         "cause": f"{problem['count']} x, found by indexing", "action": "left out of every epoch"}
        for number in dict.fromkeys(members) for problem in index.shards[number].problems
        if problem["kind"] != "no caption"  # such a sample has its place in the order: it is replaced, and told then
    ]  # fmt: skip


def _good(chunk: Chunk | Failed) -> Chunk:
    if isinstance(chunk, Failed):
        raise chunk.error
    return chunk


def _and_more(listed: list[Any]) -> str:
    return f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""


class _Chunks(Dataset):
    """The workers' side: place -> chunk."""

    def __init__(self, spec: ChunkSpec) -> None:
        self._maker = ChunkMaker(spec)

    def __getitem__(self, place: tuple[int, int, int]) -> Chunk | Failed:
        return self._maker.make(*place)


def start_worker_server() -> None:
    """Starts the process that workers are forked from. It has none of this one's threads and devices, imports what
    workers need while the run builds its model, and hands down that signals to the whole group are not theirs."""
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.set_forkserver_preload(["amclip_ds.data.worker_imports"])
    try:
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except OSError as error:
        raise AmclipError(f"data.workers: no worker process can be started: {error}") from None


def _end_workers(stream: Any) -> None:
    """Ends a torch iterator's workers now. Its own way, which waits for garbage collection, leaves them running while
    a traceback holds the iterator; and it asks by SIGTERM, which they do not hear."""
    processes = list(stream._workers)
    stream._shutdown_workers()
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join(LOOK_AFTER_S)


def _become_worker(worker: int) -> None:
    """In a new worker: signals are the run's business, and it does not outlive the run."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    _give_memory_back()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _give_memory_back() -> None:
    """Keeps large buffers out of the heap. glibc moves its threshold up when they are freed, and decoded images of
    all sizes then leave holes that a worker never gives back (measured: docs/log.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE_BUFFER)
            libc.mallopt(M_TRIM_THRESHOLD, LARGE_BUFFER)


def _end_with_the_run() -> None:
    """Ends this worker when the training process ends, however it does. Its parent is the server, which itself lives
    until the last worker is gone, so that nothing but this pipe tells."""
    run = multiprocessing.parent_process()
    if run is not None:
        multiprocessing.connection.wait([run.sentinel])
        os._exit(1)
