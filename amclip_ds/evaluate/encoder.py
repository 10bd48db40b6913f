"""A model as evaluation sees it: images and texts in, unit vectors out; and how ranks share the work of encoding.

Shapes: B batch, E embedding, D width of the vision tower, T tokens.

The batches of a set are cut the same way in every world and dealt out whole, the last one filled up, so each embedding
comes out of the same forward call whoever computes it: the numbers do not depend on the number of ranks.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amclip_ds.comm import Comm
from amclip_ds.data import photometric
from amclip_ds.data.captions import build_tokenizer, trim
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.evaluate.datasets import Sample
from amclip_ds.evaluate.token_removal import selection
from amclip_ds.masks.selection import Selection
from amclip_ds.progress import progress
from amclip_ds.ranks.collectives import on_all

TEXT_BUCKET = 8  # tokens; texts of a batch are cut to its longest, rounded up to this
MAX_RESIZED = 1 << 26  # pixels of an image whose shorter side was brought to the model's size
READERS = 4  # threads that decode images; Pillow releases the lock


class Encoder(Protocol):
    """What can be evaluated. At ZeRO-3 both calls are collective."""

    weights: str
    """student | teacher"""
    image_size: int
    say: Callable[[str], None] | None
    """called with how far the encoding is; None: not"""

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image -> what `image` stacks."""
        ...

    def image(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """Stacked images [B, 3, H, W] -> unit vectors [B, E] fp32. numbers: of the first images in their set, by which
        patches are removed, where they are."""
        ...

    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [B, E] fp32."""
        ...

    def features(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """Stacked images [B, 3, H, W] -> what probes learn from [B, D] fp32. numbers: as image."""
        ...


class Towers(Protocol):
    """What embeds images and texts."""

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> [B, E] fp32 rows of unit length."""
        ...

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, E] the same."""
        ...


class TowerEncoder:
    """Our own towers: a module, or an engine around one."""

    say: Callable[[str], None] | None = None

    def __init__(
        self,
        towers: Towers,
        weights: str,
        image_size: int,
        context_length: int,
        device: torch.device,
        keep_ratio: float = 1.0,
    ) -> None:
        """towers: AClip, TeacherModel, or the engine of one. keep_ratio: share of an image's patches that is encoded
        (token_removal); below 1 of a module only."""
        self.towers, self.weights, self.image_size = towers, weights, image_size
        self.context_length, self.device, self.keep_ratio = context_length, device, keep_ratio

    def preprocess(self, image: Image.Image) -> Tensor:
        """Shortest side resized to the model's, centre cut: [3, H, H] uint8."""
        return resize_and_crop(image, self.image_size)

    @torch.no_grad()
    def image(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """uint8, or float and normalised [B, 3, H, H] -> [B, E]."""
        pixels = self._normalised(images)
        if self.keep_ratio == 1:
            return self.towers.embed_images(pixels)
        return cast(Any, self.towers).embed_images(pixels, self._removing(numbers, len(images)))

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [B, E]."""
        ids = trim(token_ids(tuple(texts), self.context_length), TEXT_BUCKET)
        return self.towers.embed_texts(ids.to(self.device))

    def logit_scale(self) -> float:
        """exp(logit_scale); of a module only."""
        return float(cast(Any, self.towers).logit_scale.detach().float().exp())

    @torch.no_grad()
    def features(self, images: Tensor, numbers: Sequence[int] = ()) -> Tensor:
        """[B, 3, H, H] as of `image` -> the tower's feature [B, D]; of a module only, since no engine gives it."""
        vision, pixels = cast(Any, self.towers).vision, self._normalised(images)
        return vision.feature(vision(pixels, self._removing(numbers, len(images))).tokens).float()

    def _normalised(self, images: Tensor) -> Tensor:
        """The pixels as the tower takes them, on its device; floats are so already."""
        images = images.to(self.device)
        return photometric.normalise(images) if images.dtype == torch.uint8 else images

    def _removing(self, numbers: Sequence[int], rows: int) -> tuple[Selection, ...]:
        """How the patches of a batch are chosen; none: every one stays."""
        if self.keep_ratio == 1:
            return ()
        return (selection(self.keep_ratio, cast(Any, self.towers).vision.grid, numbers, rows, self.device),)


@lru_cache(maxsize=1)
def tokenizer() -> Callable[[Sequence[str], int], Tensor]:
    """The tokenizer of all text towers here, built once."""
    return build_tokenizer()


@lru_cache(maxsize=4096)
def token_ids(texts: tuple[str, ...], context_length: int) -> Tensor:
    """Ids [B, T] of a batch of texts; kept, since evaluations during training ask for the same prompts again."""
    return tokenizer()(texts, context_length)


def resized_size(sides: tuple[int, int], size: int) -> tuple[int, int]:
    """(width, height) with the shorter one `size`, as torchvision rounds. Raises UserError for a line without breadth,
    which would be blown up to any size."""
    width, height = sides
    resized = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    if resized[0] * resized[1] > MAX_RESIZED:
        raise UserError(f"{width} x {height} pixels cannot be resized to a shorter side of {size}")
    return resized


def resize_and_crop(image: Image.Image, size: int) -> Tensor:
    """RGB image -> uint8 [3, size, size]: bilinear with antialias, as torchvision does it on Pillow images."""
    width, height = resized_size(image.size, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def encode_images(
    encoder: Encoder,
    samples: Sequence[Sample],
    batch_size: int,
    comm: Comm,
    then: Callable[[Tensor, range], Tensor] | None = None,
) -> Tensor:
    """Embeddings of all images [N, E], or what `then(embeddings, their numbers)` makes of each batch; on every rank.

    Collective: every rank must call. Raises the first unreadable image's error, of any rank, on all of them.
    """
    errors: list[AmclipError] = []

    def load(sample: Sample) -> Tensor:
        try:
            return encoder.preprocess(_read(sample, encoder.image_size))
        except Exception as error:
            reported = error if isinstance(error, AmclipError) else AmclipError(f"{sample.place}: {error}")
            if comm.world_size == 1:
                raise reported from error
            errors.append(reported)  # raised after the last batch: others wait for this rank's part of every forward
            return encoder.preprocess(Image.new("RGB", (encoder.image_size, encoder.image_size)))

    def work(numbers: range, images: Sequence[Tensor]) -> Tensor:
        missing = batch_size - len(images)
        batch = torch.stack([*images, *[torch.zeros_like(images[0])] * missing])
        embeddings = encoder.image(batch, numbers)[: len(images)]
        return then(embeddings, numbers) if then else embeddings

    batches = _deal(len(samples), batch_size, comm)
    with warnings.catch_warnings():  # the readers' own calls of it cross each other: what they leave ends here
        rows = []
        with (
            closing(_load_ahead([[samples[number] for number in batch] for batch in batches], load)) as loaded,
            _progress_of(encoder, "images", len(samples), comm) as advance,
        ):
            for batch, images in zip(batches, loaded, strict=True):
                rows.append(work(batch, images))
                advance(comm.world_size * len(batch))
    on_all(partial(_raise_first, errors))
    return _collect(rows, len(samples), batch_size, comm)


@contextmanager
def _progress_of(encoder: Encoder, what: str, total: int, comm: Comm) -> Iterator[Callable[..., None]]:
    """Yields what to call with the number of images or texts that were done since."""
    if encoder.say is None or comm.rank:
        yield lambda count: None
        return
    with progress(f"{encoder.weights}: {what}", total, encoder.say) as advance:
        yield advance


def _read(sample: Sample, size: int) -> Image.Image:
    """The sample's image. Raises UserError, naming it, also where it cannot be resized to a shorter side of `size`."""
    image = sample.read()
    try:
        resized_size(image.size, size)
    except UserError as error:
        raise UserError(f"{sample.place}: {error}") from None
    return image


def encode_texts(encoder: Encoder, texts: Sequence[str], batch_size: int, comm: Comm) -> Tensor:
    """Embeddings of all texts [N, E], on every rank. Collective: every rank must call."""
    rows = []
    with _progress_of(encoder, "texts", len(texts), comm) as advance:
        for batch in _deal(len(texts), batch_size, comm):
            padded = [texts[number] for number in batch] + [""] * (batch_size - len(batch))
            rows.append(encoder.text(padded)[: len(batch)])
            advance(comm.world_size * len(batch))
    return _collect(rows, len(texts), batch_size, comm)


def share_rows(count: int, batch_size: int, comm: Comm, work: Callable[[range], Tensor]) -> Tensor:
    """The rows [n, ...] that `work` makes of each batch of the numbers below `count`, in order, on every rank.

    Collective: every rank must call.
    """
    return _collect([work(batch) for batch in _deal(count, batch_size, comm)], count, batch_size, comm)


def _deal(count: int, batch_size: int, comm: Comm) -> list[range]:
    """This rank's batches of the numbers below `count`: batch b is rank (b mod world)'s.

    Every rank gets the same number of them; where none is left it gets an early one again, whose rows are dropped.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    rounds = -(-len(batches) // comm.world_size)
    return [batches[(turn * comm.world_size + comm.rank) % len(batches)] for turn in range(rounds)]


def _collect(rows: list[Tensor], count: int, batch_size: int, comm: Comm) -> Tensor:
    """The rows [n, ...] of every rank's batches, as `_deal` dealt them -> [count, ...] in order, on every rank.

    Collective: every rank must call.
    """
    full = rows[0].new_zeros(len(rows), batch_size, *rows[0].shape[1:])
    for place, part in zip(full, rows):
        place[: len(part)] = part
    everything = comm.all_gather(full)  # [world * rounds, batch, ...], rank by rank
    return everything.unflatten(0, (comm.world_size, len(rows))).transpose(0, 1).flatten(0, 2)[:count]


def _load_ahead(
    batches: Sequence[Sequence[Sample]], load: Callable[[Sample], Tensor]
) -> Generator[list[Tensor], None, None]:
    """Each batch loaded, while the next is being read. To be closed by its caller: left to the garbage collector it
    joins its threads from whichever thread collects, and from one that is being started, that never ends."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: list[list[Future[Tensor]]] = []
        try:
            for batch in batches:
                waiting.append([pool.submit(load, sample) for sample in batch])
                if len(waiting) > 1:
                    yield [future.result() for future in waiting.pop(0)]
            for futures in waiting:
                yield [future.result() for future in futures]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def _raise_first(errors: list[AmclipError]) -> None:
    if errors:
        raise errors[0]
