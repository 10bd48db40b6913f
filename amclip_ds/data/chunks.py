"""A chunk: some consecutive samples of one rank's part of a batch, read, decoded and tokenised. Workers make these.

What a chunk holds is a pure function of (seed, epoch, step, rank's slice): no state passes from chunk to chunk.
Shapes: V views, B samples of the chunk, S side of a view, s of the teacher's crop, U units of tokens, T context length.
"""

import contextlib
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amclip_ds.data import captions, photometric
from amclip_ds.data.config import View
from amclip_ds.data.exclude import Excluded
from amclip_ds.data.order import EpochOrder, Mixture
from amclip_ds.data.views import ViewMaker, Views, planes
from amclip_ds.errors import AmclipError, LocalRunStopped, UserError
from amclip_ds.files import OF_THE_MACHINE, describe
from amclip_ds.images import Scratch
from amclip_ds.keyed_random import Keyed, keyed
from amclip_ds.masks.text import TextMaskConfig, Words, masked, prepare
from amclip_ds.masks.text.cloze import hide
from amclip_ds.masks.units import NONE
from amclip_ds.shards import contents as contents_of
from amclip_ds.shards.index import Index, Sample
from amclip_ds.shards.reader import Request, ShardChanged, ShardReader, outlasting
from amclip_ds.shards.tar import printable

Contents = dict[Request, bytes | OSError]
TRIED = 4  # of a chunk of which nothing could be read
AGAIN_S = (1.0, 2.0)  # pauses before what is left is read again, where other places of the chunk can be read
MAX_REPLACED = 64  # bad samples in a row, each replacing the last, before the stream counts as empty
FLIP_P = 0.5
CAPTIONS_REMEMBERED = 1 << 14
CHANGES_TOLD = 16  # of a shard, by each worker: the whole shard may be another


@dataclass(frozen=True)
class ChunkSpec:
    """Everything that decides what chunks hold; small, so that it can be sent to workers."""

    index: str
    """the index's folder"""
    paths: tuple[str, ...]
    """where each shard of the stream is read"""
    members: tuple[int, ...]
    """each shard's number in the index"""
    mixture: Mixture
    seed: int
    open_shards: int
    window: int
    views: tuple[View, ...]
    image_size: int
    teacher_size: int | None
    teacher_contains: bool
    """the teacher's crop contains every view (boxes.draw_boxes)"""
    num_units: int
    draws_twice: bool
    """whether masks read a second draw"""
    context_length: int
    text_mask: TextMaskConfig
    fills_text_budget: bool
    words_hash: str
    """of the table that the text mask reads; empty: none"""
    hidden_share: float
    """of a text's words that are hidden in the cloze form; 0: no objective reads it"""
    sources: tuple[str, ...]
    per_line: bool
    max_pixels: int
    stage_dir: str
    stage_bytes: int
    on_change: str
    """`refuse` or `report`: data.on_change"""
    keep_colours: bool = False
    excluded: Excluded = field(default_factory=Excluded)
    """of data.exclude"""


@dataclass
class Chunk:
    """The samples of positions [start, start + B) of an epoch. A worker sends it as memory of its own (workers.py)."""

    views: Tensor
    """[V, B, S, S, 3] uint8: as decoders write and the resizer reads; the device makes planes of it (photometric.py)"""
    teacher: Tensor | None
    """[B, s, s, 3] uint8"""
    boxes: np.ndarray
    """[V + 1, B, 4] float32"""
    photometric: np.ndarray
    """[V, B, columns] float32"""
    noise: np.ndarray
    """[V, B, U] float32"""
    token_ids: np.ndarray
    """[B, T] int64, not trimmed"""
    sample_ids: np.ndarray
    """[B] int64"""
    flips: np.ndarray
    """[V, B] bool"""
    noise2: np.ndarray
    """[V, B, U] float32; U is 0 where no mask reads it"""
    masked_ids: np.ndarray
    """[B, T'] int64; T' is 0 where no text is masked"""
    cloze_ids: np.ndarray
    """[B, T''] int64, T'' as T or 0: the ids with some words hidden (masks/text/cloze.py)"""
    incidents: list[dict[str, str]] = field(default_factory=list)
    read_bytes: int = 0


@dataclass(frozen=True)
class Failed:
    """A chunk that could not be made: an error that ends the run, reported without a worker's traceback."""

    error: AmclipError


@dataclass(frozen=True)
class _Wanted:
    """One place of a chunk and the sample that is there."""

    sample: Sample
    shard: str
    copy: int | str
    """distinguishes the copies of a sample in an epoch, so that each gets its own views"""


class _Encoded(NamedTuple):
    """A caption's token ids."""

    row: np.ndarray
    """[T] int64, start and end among them, cut to the context"""
    words: Words
    """all its words, uncut; none where no text is masked"""


class ChunkMaker:
    """Makes chunks. Opens index, shards and tokenizer at first use, in the process that uses them.

    keeps_memory: a chunk's images are valid until the next chunk is made: for workers, which send copies.
    """

    def __init__(self, spec: ChunkSpec, keeps_memory: bool = False) -> None:
        self.spec = spec
        most_bytes = sys.maxsize if keeps_memory else 0
        self._views, self._teachers = Scratch(most_bytes), Scratch(most_bytes)
        self._index: Index | None = None
        self._view_maker, self._keyed = ViewMaker(), Keyed()
        self._reads_text, self._reads_json = captions.members_read(spec.sources)
        self._draws_of = [n if view.draws_of is None else view.draws_of for n, view in enumerate(spec.views)]
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._tokens: OrderedDict[str, _Encoded] = OrderedDict()
        self._retries: list[dict[str, str]] = []
        self._crops: list[tuple[Tensor, ...]] = []
        self._changed: Counter[str] = Counter()
        self._asked: deque[tuple[int, int, int]] = deque(maxlen=4)
        """windows (epoch, group, window) that were asked for lately"""

    def make(self, epoch: int, start: int, stop: int) -> Chunk | Failed:
        """The samples at positions [start, stop) of an epoch."""
        try:
            self._open()
            return self._make(epoch, start, stop)
        except AmclipError as error:
            return Failed(error)

    def close(self) -> None:
        """Closes the shards."""
        if self._index is not None:
            self._reader.close()
            self._index = None

    def order(self, epoch: int) -> EpochOrder:
        """An epoch's order; the last two are kept."""
        self._open()
        if epoch not in self._orders:
            assert self._index is not None
            counts = self._index.counts[list(self.spec.members)]
            self._orders[epoch] = EpochOrder(
                counts, self.spec.mixture, self.spec.seed, epoch, self.spec.open_shards, self.spec.window
            )
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _open(self) -> None:
        if self._index is None:
            self._text_options = prepare(self.spec.text_mask, self.spec.fills_text_budget, self.spec.words_hash)
            index = Index(self.spec.index)
            self._tokenizer = captions.build_tokenizer()
            sizes = {path: index.shards[n].size for path, n in zip(self.spec.paths, self.spec.members)}
            self._reader = ShardReader(self.spec.stage_dir or None, self.spec.stage_bytes, self._retried, sizes)
            self._index = index  # last: once it is there, all is

    def _retried(self, shard: str, cause: str) -> None:
        self._retries.append(_incident("retried", shard, "", cause, "read again"))

    def _make(self, epoch: int, start: int, stop: int) -> Chunk:
        spec, count = self.spec, stop - start
        V, U, S, s = len(spec.views), spec.num_units, spec.image_size, spec.teacher_size
        chunk = Chunk(
            views=torch.from_numpy(self._views.take(V, count, S, S, 3)),
            teacher=torch.from_numpy(self._teachers.take(count, s, s, 3)) if s else None,
            boxes=np.empty((V + 1, count, 4), np.float32),
            photometric=np.empty((V, count, photometric.NUM_COLUMNS), np.float32),
            noise=np.empty((V, count, U), np.float32),
            token_ids=np.zeros((count, spec.context_length), np.int64),
            sample_ids=np.empty(count, np.int64),
            flips=np.zeros((V, count), np.bool_),
            noise2=np.empty((V, count, U if spec.draws_twice else 0), np.float32),
            masked_ids=np.zeros((count, spec.text_mask.tokens if self._masks_text else 0), np.int64),
            cloze_ids=np.zeros((count, spec.context_length if spec.hidden_share else 0), np.int64),
        )
        self._retries, self._crops = chunk.incidents, _crops_of(chunk)
        self._read_ahead(epoch, start)
        wanted = {place: self._wanted(row, int(row[2])) for place, row in enumerate(self._rows(epoch, start, stop))}
        read: Contents = {}
        for attempt in range(MAX_REPLACED + 1):
            contents = self._read(wanted, chunk)
            read |= contents
            if cause := _unread_alike(read):
                raise AmclipError(f"data.train: {cause}; once it can be read again, the same command resumes")
            bad = {place: last for place, last in wanted.items() if not self._fill(chunk, place, last, contents, epoch)}
            if not bad:
                return chunk
            wanted = {place: self._replacement(epoch, start + place, attempt) for place in bad}
        if not chunk.incidents:
            raise UserError(f"data.exclude: leaves out {MAX_REPLACED + 1} samples in a row; name fewer")
        last = chunk.incidents[-1]
        raise UserError(
            f"data.train: {MAX_REPLACED + 1} samples in a row cannot be used, the last of them {last['key']} in"
            f" {last['shard']}: {last['cause']}; `amclip data check` shows what is wrong"
        )

    def _read_ahead(self, epoch: int, position: int) -> None:
        """Asks for the window that a position is in and the next one, once each, as one long read a shard."""
        assert self._index is not None
        order, spec = self.order(epoch), self.spec
        for at in (position, min(position + spec.window, order.length - 1)):
            window = order.window_at(at)
            if (epoch, *window) in self._asked:
                continue
            self._asked.append((epoch, *window))
            for shard, first, last in order.spans(*window):
                start_id = int(self._index.starts[spec.members[shard]])
                start, stop = self._index.bytes_of(start_id + first, start_id + last - 1)
                self._reader.will_need(spec.paths[shard], start, stop)

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        return self.order(epoch).locate(start, stop)

    def _wanted(self, row: np.ndarray, copy: int | str) -> _Wanted:
        assert self._index is not None
        shard, within = int(row[0]), int(row[1])
        sample = self._index.sample(int(self._index.starts[self.spec.members[shard]]) + within)
        return _Wanted(sample, self.spec.paths[shard], copy)

    def _replacement(self, epoch: int, position: int, attempt: int) -> _Wanted:
        """The sample that replaces a bad one: drawn from the epoch, keyed by the place, whoever asks."""
        order = self.order(epoch)
        other = int(keyed(self.spec.seed, "replacement", epoch, position, attempt).integers(order.length))
        return self._wanted(self._rows(epoch, other, other + 1)[0], f"instead of {position}")

    def _read(self, wanted: dict[int, _Wanted], chunk: Chunk) -> Contents:
        """What the wanted samples' members hold; shards are read front to back. Raises AmclipError where nothing of a
        chunk can be read for minutes: that is the file system, and no bad sample."""
        requests = [(w.shard, *place) for w in wanted.values() for place in self._places(w.sample)]
        contents = self._reader.read(requests)
        if failing := _failing(contents):
            self._read_alone(failing, contents)
        chunk.read_bytes += sum(len(content) for content in contents.values() if isinstance(content, bytes))
        return contents

    def _read_alone(self, failing: list[Request], contents: Contents) -> None:
        """Neighbours are read together, so that a bad place of a disk fails all of them: each is read by itself."""
        if len(failing) == len(contents):  # perhaps nothing can be read; a few of them show it
            some = failing[:: max(1, len(failing) // TRIED)]
            outlasting(some[0][0], lambda: self._first_of(some))
        for pause in (0.0, *AGAIN_S):
            time.sleep(pause)
            for request in failing:
                try:
                    contents[request] = self._afresh(request)
                except OSError as error:
                    contents[request] = error
            failing = _failing(contents)
            if not failing:
                return

    def _first_of(self, requests: list[Request]) -> bytes:
        """What the first holds that can be read. Raises OSError where none can."""
        for request in requests[:-1]:
            with contextlib.suppress(OSError):
                return self._afresh(request)
        return self._afresh(requests[-1])

    def _afresh(self, request: Request) -> bytes:
        """Of the shard itself, opened anew: its copy in data.stage_dir may be what is bad. Raises OSError."""
        shard, offset, size = request
        (content,) = self._reader.read_afresh(shard, [(offset, size)])
        assert content is not None
        return content

    def _places(self, sample: Sample) -> list[tuple[int, int]]:
        """(offset, size) of the members that training reads."""
        places = sample.image, sample.text if self._reads_text else None, sample.json if self._reads_json else None
        return [place for place in places if place]

    def _fill(self, chunk: Chunk, place: int, wanted: _Wanted, contents: Contents, epoch: int) -> bool:
        """Puts a sample into its place. False, with an incident, if it cannot be used."""
        sample, spec = wanted.sample, self.spec
        if (wanted.shard, sample.key) in spec.excluded:  # no incident: it is asked for, and data.max_skip_rate is not
            return False
        random = self._keyed(spec.seed, "sample", epoch, sample.sample_id, wanted.copy)
        try:
            members = [self._content(contents, wanted.shard, at) for at in (sample.image, sample.text, sample.json)]
            members = self._as_indexed(wanted, members, chunk)
            options = captions.candidates(members[1], members[2], spec.sources, spec.per_line)
            text = captions.choose(options, random)
            made = self._view_maker.make(
                members[0] or b"",
                random,
                spec.views,
                self._crops[place],
                spec.teacher_contains,
                spec.max_pixels,
            )
        except ShardChanged as error:
            self._report_change(wanted, str(error), "replaced", chunk)
            return False
        except (ValueError, OSError) as error:  # BadImage, BadText, or what a decoder raises on odd bytes
            kind = getattr(error, "kind", "unreadable")
            cause = describe(error) if isinstance(error, OSError) else str(error)  # no names in it: causes are counted
            chunk.incidents.append(_incident(kind, wanted.shard, sample.key, cause, "replaced"))
            return False
        if made.damaged:
            chunk.incidents.append(_incident("damaged", wanted.shard, sample.key, made.damaged, "decoded all the same"))
        self._put(chunk, place, made, random)
        encoded = self._encode(text)
        chunk.token_ids[place] = encoded.row
        if self._masks_text:
            ids = masked(spec.text_mask, self._text_options, encoded.words, random)
            chunk.masked_ids[place, : len(ids) + 2] = [self._tokenizer.start, *ids, self._tokenizer.end]
        if spec.hidden_share:
            length = int(encoded.row.nonzero()[0][-1]) + 1
            drawn = random.random(spec.context_length)
            chunk.cloze_ids[place] = hide(encoded.row, length, drawn, spec.hidden_share)
        chunk.sample_ids[place] = sample.sample_id
        return True

    def _as_indexed(self, wanted: _Wanted, members: list[bytes | None], chunk: Chunk) -> list[bytes | None]:
        """The members, which are what the index noted, perhaps at a second reading. Raises LocalRunStopped where they
        are not; with data.on_change=report it is an incident, and they are taken as they are."""
        sample, key = wanted.sample, printable(wanted.sample.key)
        differing = _differing(sample, members)
        if not differing:
            return members
        places = [place if members[i] is not None else None for i, place in enumerate(_members_of(sample))]
        again = outlasting(wanted.shard, lambda: self._reader.read_afresh(wanted.shard, places))
        if not (still := _differing(sample, again)):  # a bad moment of a disk or a network, or a bad copy
            self._retried(wanted.shard, f"the {differing} of {key} came wrong, and right at a second reading")
            return again
        cause = f"the {still} of {key} is not what was indexed: the shard changed since"
        self._report_change(wanted, cause, "trained on all the same", chunk)
        return again

    def _report_change(self, wanted: _Wanted, cause: str, action: str, chunk: Chunk) -> None:
        """An incident, where data.on_change allows it. Raises LocalRunStopped where it does not."""
        if self.spec.on_change == "refuse":
            raise LocalRunStopped(
                f"data.train: {wanted.shard}: {cause}; put the old shard back, or index it anew (amclip data index) for"
                f" a new run; data.on_change=report trains on what there is, and reports it"
            )
        self._changed[wanted.shard] += 1
        if self._changed[wanted.shard] <= CHANGES_TOLD or action == "replaced":  # the ledger counts what is replaced
            chunk.incidents.append(_incident("changed", wanted.shard, wanted.sample.key, cause, action))

    def _put(self, chunk: Chunk, place: int, made: Views, random: np.random.Generator) -> None:
        """A sample's boxes and draws. What is drawn keeps its order: new draws come after all that there were, so
        that a seed's samples stay what they are."""
        spec = self.spec
        chunk.boxes[:, place] = made.boxes
        V, sources = len(spec.views), self._draws_of
        changes = [photometric.draw(random, view.colours) for view in spec.views]
        for place_of_view, view in enumerate(spec.views):
            chunk.photometric[place_of_view, place] = changes[sources[place_of_view]] if view.photometric else 0
        if spec.keep_colours:
            chunk.photometric[:, place, photometric.CHANGES_COLOUR] = 0
        chunk.noise[:, place] = random.random((V, spec.num_units), dtype=np.float32)
        if any(view.flip for view in spec.views):
            self._flip(chunk, place, random.random(V)[sources] < FLIP_P)
        if spec.draws_twice:
            chunk.noise2[:, place] = random.random((V, spec.num_units), dtype=np.float32)

    def _flip(self, chunk: Chunk, place: int, drawn: np.ndarray) -> None:
        chunk.flips[:, place] = drawn & [view.flip for view in self.spec.views]
        for view in np.flatnonzero(chunk.flips[:, place]):
            chunk.views[view, place] = chunk.views[view, place].flip(1)

    @staticmethod
    def _content(contents: Contents, shard: str, place: tuple[int, int] | None) -> bytes | None:
        content = contents.get((shard, *place)) if place else None
        if isinstance(content, OSError):
            raise content
        return content

    @property
    def _masks_text(self) -> bool:
        return self.spec.text_mask.strategy != NONE

    def _encode(self, text: str) -> _Encoded:
        """Captions seen lately are remembered, since many data sets repeat them."""
        if text in self._tokens:
            self._tokens.move_to_end(text)
            return self._tokens[text]
        row = self._tokenizer.row(text, self.spec.context_length)
        encoded = _Encoded(row, self._tokenizer.words(text) if self._masks_text else ())
        self._tokens[text] = encoded
        if len(self._tokens) > CAPTIONS_REMEMBERED:
            self._tokens.popitem(last=False)
        return encoded


def _failing(contents: Contents) -> list[Request]:
    return [at for at, got in contents.items() if isinstance(got, OSError) and got.errno in OF_THE_MACHINE]


def _unread_alike(contents: Contents) -> str:
    """Why nothing of several shards could be read, for one and the same reason: that is no property of samples, as
    EACCES of an expired ticket is none. Empty where something was read, or the reason may be a single shard's."""
    if any(not isinstance(got, OSError) for got in contents.values()):  # the usual case: the first one is there
        return ""
    errnos, shards = {got.errno for got in contents.values()}, {shard for shard, _, _ in contents}  # type: ignore[union-attr]
    if None in errnos or len(errnos) != 1 or len(shards) < 2:
        return ""
    (shard, _, _), error = next(iter(contents.items()))
    return f"{len(shards)} shards cannot be read, the first {shard}: {describe(error)}"  # type: ignore[arg-type]


def _crops_of(chunk: Chunk) -> list[tuple[Tensor, ...]]:
    """Each sample's views and teacher's crop, [1, 3, side, side], in the chunk's memory."""
    parts = [*chunk.views.unbind(), *([] if chunk.teacher is None else [chunk.teacher])]
    return list(zip(*(planes(part.unsqueeze(1)).unbind() for part in parts)))


def _members_of(sample: Sample) -> tuple[tuple[int, int] | None, ...]:
    return sample.image, sample.text, sample.json


def _differing(sample: Sample, members: list[bytes | None]) -> str:
    """Which of the members that were read is not what was indexed: image, text or json; empty if all are."""
    noted = sample.checksums or (0, 0, 0)
    pairs = zip(contents_of.MEMBERS, members, noted)
    return next(
        (
            name
            for name, content, known in pairs
            if content is not None and known and contents_of.checksum(content) != known
        ),
        "",
    )


def _incident(kind: str, shard: str, key: str, cause: str, action: str) -> dict[str, str]:
    return {"kind": kind, "shard": shard, "key": printable(key), "cause": printable(cause), "action": action}


def join(chunks: Sequence[Chunk], pinned: bool = False) -> Chunk:
    """Chunks of consecutive positions as one. pinned: images in page-locked memory, which a GPU reads by itself."""
    if len(chunks) == 1 and not pinned:
        return chunks[0]
    teachers = [chunk.teacher for chunk in chunks if chunk.teacher is not None]
    return Chunk(
        views=_cat([chunk.views for chunk in chunks], 1, pinned),
        teacher=_cat(teachers, 0, pinned) if teachers else None,
        boxes=np.concatenate([chunk.boxes for chunk in chunks], axis=1),
        photometric=np.concatenate([chunk.photometric for chunk in chunks], axis=1),
        noise=np.concatenate([chunk.noise for chunk in chunks], axis=1),
        token_ids=np.concatenate([chunk.token_ids for chunk in chunks]),
        sample_ids=np.concatenate([chunk.sample_ids for chunk in chunks]),
        flips=np.concatenate([chunk.flips for chunk in chunks], axis=1),
        noise2=np.concatenate([chunk.noise2 for chunk in chunks], axis=1),
        masked_ids=np.concatenate([chunk.masked_ids for chunk in chunks]),
        cloze_ids=np.concatenate([chunk.cloze_ids for chunk in chunks]),
        incidents=[incident for chunk in chunks for incident in chunk.incidents],
        read_bytes=sum(chunk.read_bytes for chunk in chunks),
    )


def _cat(tensors: Sequence[Tensor], dim: int, pinned: bool) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.cat(list(tensors), dim, out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pinned))
