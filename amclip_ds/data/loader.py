"""The training stream: which samples a rank gets in which step, made by worker processes, as batches on the CPU.

Positions of an epoch (order.py) fall into global batches of `global_batch`; rank r of W takes the r-th of W equal
slices of each. A cursor {"epoch", "step"} in global batches is the whole state, so the stream resumes unbroken from any
batch, on any number of ranks and workers, and batches that were only prefetched are not lost.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amclip_ds.data import captions
from amclip_ds.data.batch import Batch
from amclip_ds.data.chunks import Chunk, ChunkMaker, ChunkSpec, Failed, join
from amclip_ds.data.config import DataConfig
from amclip_ds.data.exclude import read_excluded
from amclip_ds.data.order import EpochOrder, Mixture
from amclip_ds.data.photometric import Photometric
from amclip_ds.data.prefetch import prefetched
from amclip_ds.data.prepare import Once, Sources, and_more, find_sources
from amclip_ds.data.views import planes
from amclip_ds.data.workers import Fault, Place, Workers, start_worker_server
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.masks.text import TextMaskConfig
from amclip_ds.shards.account import account_of
from amclip_ds.shards.index import Index
from amclip_ds.shards.sources import is_remote
from amclip_ds.shards.tar import printable

CHUNK = 64  # samples a worker makes at a time, at most
HAVE_A_PLACE = ("no caption", "not adjacent")  # such a sample is in the order: it is replaced, and reported then
CPU = torch.device("cpu")


class TrainingData:
    """One rank's part of the training stream.

    image_size, teacher_size: sides of the views and of the teacher's crop in pixels (None: there is no teacher).
    num_units: random numbers per view for the mask; draws_twice: masks read a second draw of them.
    teacher_contains: the teacher's crop contains every view (boxes.py). fills_text_budget: compat.Compat.
    hidden_share: of a text's words that are hidden in its cloze form; 0: there is none.
    once: does a work on rank 0 and gives every rank its result (ranks.collectives.on_main), so that one rank alone
    reads the shards and builds a missing index; without it every process does so by itself. Collective through it.
    index_dir: where a missing index is put (the run folder: others train on the same shards); None: beside the shards.
    resumes: whether a checkpoint was trained on these shards, so that what has changed in them since is refused.
    device: where the batches go next; for a GPU, images are in page-locked memory.
    prepare: picklable, called first in each worker process.
    on_progress: called on every rank now and then, as long as an index that is made gets from shard to shard.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        image_size: int,
        teacher_size: int | None,
        num_units: int,
        context_length: int,
        draws_twice: bool = False,
        teacher_contains: bool = True,
        fills_text_budget: bool = True,
        hidden_share: float = 0.0,
        say: Callable[[str], None] = print,
        once: Once | None = None,
        index_dir: str | Path | None = None,
        device: torch.device = CPU,
        resumes: bool = False,
        prepare: Callable[[], object] | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._device, self._prepare = device, prepare
        self.config, self.global_batch = config, global_batch
        self._say = say if rank == 0 else lambda text: None
        self._local, rest = divmod(global_batch, world_size)
        if rest:
            raise UserError(f"batch.global_size: {global_batch} does not divide by {world_size} ranks")
        self._first = rank * self._local
        if config.workers:
            start_worker_server()
        sources = find_sources(config, say, once or (lambda work: work()), index_dir, resumes, on_progress)
        self.shards = sources.shards
        self.index = index = Index(sources.index)
        members = index.find(sources.shards)
        mixture = _mixture(config, sources)
        self._spec = ChunkSpec(
            index=sources.index,
            paths=tuple(sources.shards),
            members=tuple(members),
            mixture=mixture,
            seed=seed,
            open_shards=config.open_shards,
            window=config.shuffle_window,
            views=config.all_views(),
            image_size=image_size,
            teacher_size=teacher_size,
            teacher_contains=teacher_contains,
            num_units=num_units,
            draws_twice=draws_twice,
            context_length=context_length,
            text_mask=config.text_mask,
            fills_text_budget=fills_text_budget,
            words_hash=_words_hash(config.text_mask),
            hidden_share=hidden_share,
            sources=tuple(config.captions),
            per_line=config.caption_per_line,
            max_pixels=config.max_pixels,
            stage_dir=config.stage_dir,
            stage_bytes=int(config.stage_gb * 1e9),
            on_change=config.on_change,
            keep_colours=config.keep_colours,
            excluded=read_excluded(config.exclude),
        )
        self.words_hash, self.excluded_hash = self._spec.words_hash, self._spec.excluded.hash
        if self.excluded_hash and rank == 0:
            self._say_excluded(members)
        if config.stage_dir and rank == 0 and (remote := sum(map(is_remote, self.shards))):
            self._say(f"data.stage_dir: warning: {remote} of {len(self.shards)} shards are URLs, which are not copied")
        self._known_damage = _damage(index, members) if rank == 0 else []
        self.account = account_of(index.shards[number] for number in dict.fromkeys(members))
        self.account.check(config.max_skip_rate)
        if self.account.left_out:
            self._say(f"data: {self.account}")
        counts = index.counts[members]
        self.samples_per_epoch = EpochOrder(counts, mixture, seed, 0, config.open_shards, config.shuffle_window).length
        self.steps_per_epoch = self.samples_per_epoch // global_batch
        self.fingerprint = self._fingerprint(index.fingerprint())
        self.contents = index.contents_fingerprint()
        self._check_enough()
        self._streams: list[Generator[Batch, None, None]] = []

    def batches(self, cursor: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Endless batches, where workers make them on the device already. cursor: that of the last batch that was
        consumed; None: from the start."""
        stream = self._made(cursor)
        if self.config.workers:
            stream = prefetched(stream, self._device)
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

    def first(self, count: int) -> Batch:
        """The first samples of epoch 0, at most `count`, the same on any world; made here and now. Raises UserError."""
        maker = ChunkMaker(self._spec)
        try:
            made = _good(maker.make(0, 0, min(count, self.samples_per_epoch)))
        finally:
            maker.close()
        return self._batch(made, 0, {"epoch": 0, "step": 0}, [])

    def close(self) -> None:
        """Ends the workers."""
        while self._streams:
            self._streams.pop().close()

    def _batch(self, chunk: Chunk, epoch: int, cursor: dict[str, Any], incidents: list[dict[str, str]]) -> Batch:
        forms = {"plain": chunk.token_ids, "masked": chunk.masked_ids, "cloze": chunk.cloze_ids}
        texts = {name: torch.from_numpy(ids) for name, ids in forms.items() if ids.shape[1]}
        trimmed = {name: captions.trim(ids, self.config.text_bucket) for name, ids in texts.items()}
        return Batch(
            views_uint8=planes(chunk.views),
            teacher_uint8=None if chunk.teacher is None else planes(chunk.teacher),
            boxes=torch.from_numpy(chunk.boxes),
            photometric=Photometric(chunk.photometric),
            mask_noise=torch.from_numpy(chunk.noise),
            token_ids=trimmed["plain"],
            sample_ids=torch.from_numpy(chunk.sample_ids),
            epoch=epoch,
            cursor=cursor,
            flips=torch.from_numpy(chunk.flips) if any(view.flip for view in self._spec.views) else None,
            masked_ids=trimmed.get("masked"),
            cloze_ids=trimmed.get("cloze"),
            mask_noise2=torch.from_numpy(chunk.noise2) if self._spec.draws_twice else None,
            incidents=incidents + chunk.incidents,
            read_bytes=chunk.read_bytes,
            text_lengths={name: captions.lengths(ids) for name, ids in texts.items()},
        )

    def _places(self, epoch: int, step: int) -> Iterator[Place]:
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
        deaths: list[dict[str, str]] = []

        def died(cause: str) -> None:
            deaths.append(
                {
                    "kind": "worker_died",
                    "shard": "",
                    "key": "",
                    "cause": cause,
                    "action": "another one makes the same samples",
                }
            )

        config = self.config
        with contextlib.closing(
            Workers(
                ChunkMaker(self._spec, keeps_memory=True).make,
                self._places(epoch, step),
                number=config.workers,
                ahead=config.prefetch,
                timeout_s=config.timeout_s,
                died=died,
                prepare=self._prepare,
            )
        ) as workers:
            while True:
                chunk = workers.next()
                if isinstance(chunk, Fault):
                    raise AmclipError(chunk.cause)
                if deaths and isinstance(chunk, Chunk):
                    chunk.incidents.extend(deaths)
                    deaths.clear()
                yield chunk

    def _fingerprint(self, samples: str) -> str:
        """What the order follows from, apart from the seed: the same value, the same sequence of samples."""
        facts = [
            samples,
            self.global_batch,
            self._spec.open_shards,
            self._spec.window,
            list(self._spec.members),
            self._spec.mixture.source_of_shard.tolist(),
            self._spec.mixture.weights,
            self._spec.mixture.with_replacement,
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def _say_excluded(self, members: list[int]) -> None:
        """What data.exclude leaves out of these shards: a key that is misspelt leaves out nothing."""
        keys = {path: self.index.keys(number) for path, number in zip(self.shards, members)}
        samples, unused = self._spec.excluded.count(keys.items())
        lines = f"; {unused} of its {len(self._spec.excluded)} lines name no sample here" if unused else ""
        self._say(f"data: {samples} samples are left out by {self.config.exclude}{lines}")

    def _check_enough(self) -> None:
        if self.samples_per_epoch == 0:
            raise UserError(
                f"data.train: no sample with an image in {self.shards[0]}{and_more(self.shards)}"
                f"{self.account.why_empty()}"
            )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.train: an epoch has {self.samples_per_epoch} samples, batch.global_size needs"
                f" {self.global_batch}; give more data or a smaller batch"
            )
        tail = self.samples_per_epoch - self.steps_per_epoch * self.global_batch
        if tail:
            self._say(
                f"data: {self.samples_per_epoch} samples an epoch; the last {tail} of each epoch's order are left"
                f" out, which do not fill a batch of {self.global_batch}"
            )


def _mixture(config: DataConfig, sources: Sources) -> Mixture:
    num_sources = max(sources.source_of_shard) + 1
    weights = tuple(config.weights) if config.weights is not None else (1.0,) * num_sources
    return Mixture(np.array(sources.source_of_shard), weights, config.resampled)


def _damage(index: Index, members: list[int]) -> list[dict[str, str]]:
    """What indexing found in the shards of this run, as incidents: members that no sample order can reach."""
    return [
        {
            "kind": problem["kind"],
            "shard": index.shards[number].path,
            "key": printable(problem["key"]),
            "cause": f"{problem['count']} x, found by indexing",
            "action": "left out of every epoch",
        }
        for number in dict.fromkeys(members)
        for problem in index.shards[number].problems
        if problem["kind"] not in HAVE_A_PLACE
    ]


def _words_hash(config: TextMaskConfig) -> str:
    """The hash of the table that a text mask reads; empty: none. Raises UserError for a table of another tokenizer."""
    table = config.read_table()
    if table is None:
        return ""
    captions.check_table(table, config.table)
    return table.hash


def _good(chunk: Chunk | Failed) -> Chunk:
    if isinstance(chunk, Failed):
        raise chunk.error
    return chunk
