"""The samples of any step of a run, found again from its number: the order of data is a pure function of it."""

import base64
import dataclasses
import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from amclip_ds import config as settings
from amclip_ds import run as runs
from amclip_ds import run_files
from amclip_ds.checkpoint import manifest
from amclip_ds.config import TrainConfig
from amclip_ds.data import captions, photometric
from amclip_ds.data.batch import Batch
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.order import EpochOrder
from amclip_ds.display import one_line
from amclip_ds.errors import UserError
from amclip_ds.files import is_regular, not_written, read_json, write_atomically
from amclip_ds.images import open_image
from amclip_ds.keyed_random import keyed
from amclip_ds.method import method_of
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.shards.reader import ShardReader

FILES = ("data.train", "data.index", "data.exclude", "data.text_mask.table")  # what may be elsewhere than it was
DIFFERENCES = {  # a hash that a checkpoint holds of its data -> what differs where it does: the key, what, what to do
    "data": (
        "data.train",
        "other samples, or in another order, than the run had",
        "the same shards in the same order, batch.global_size and data.shuffle_window",
    ),
    "contents": ("data.train", "the same names, and other contents, than the run had", "the shards as they were"),
    "words": ("data.text_mask.table", "another table than the run had", "the table as it was"),
    "excluded": ("data.exclude", "leaves out other samples than the run did", "the file as it was; null: none"),
}
ALONE = Runtime(0, 1, 0, 1, 1, 0, torch.device("cpu"), "alone", True)


@dataclass(frozen=True)
class FoundSample:
    """A sample of a step."""

    place: int
    """in the global batch"""
    sample_id: int
    key: str
    shard: str
    offset: int
    """of its image in the shard, in bytes"""
    caption: str
    """the one that was drawn"""
    image: bytes
    """its member, as it is in the shard"""
    is_replacement: bool
    """it replaces one that cannot be used"""


def config_of(run: Path) -> TrainConfig:
    """The settings of a run, for reading its data here. Raises UserError."""
    run_files.check_is_run(run)
    return for_reading(settings.load_run(run / run_files.CONFIG), run)


def for_reading(config: TrainConfig, run: Path) -> TrainConfig:
    """The same settings, with data that this process reads by itself; an index is expected in the run's folder."""
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, out=str(run)),
        data=dataclasses.replace(config.data, workers=0, stage_dir=""),
    )


@contextmanager
def opened(config: TrainConfig) -> Iterator[TrainingData]:
    """The training data of a run, whole batches on one rank. Raises UserError where they are not there."""
    with closing(runs.open_data(config, method_of(config), ALONE)) as data:
        yield data


def hashes_of(run: Path, step: int = 0) -> dict[str, str]:
    """What the data of a step was, as hashes by name: by the first checkpoint from that step on that is left, else by
    the newest, or as a capsule holds it. Empty: none is left. Raises UserError.
    """
    if is_regular(run / run_files.DATA):
        held = read_json(run / run_files.DATA, dict).get("hashes")
        return held if isinstance(held, dict) else {}
    found: dict[str, str] = {}
    for one in manifest.all_of(run / run_files.CHECKPOINTS):
        found = one.hashes
        if one.step >= step:
            break
    return found


def differing(data: TrainingData, known: dict[str, str]) -> list[str]:
    """Which of the hashes that a checkpoint holds these data do not have; DIFFERENCES has them in words."""
    here = {"data": data.fingerprint, "contents": data.contents, "words": data.words_hash}
    odd = [name for name, value in here.items() if value and name in known and known[name] != value]
    is_other = bool(known) and data.excluded_hash != known.get("excluded", "")
    return odd + ["excluded"] * is_other


def place_of(data: TrainingData, step: int) -> tuple[int, int]:
    """(epoch, batch within it) of a step, which are counted from 1."""
    return divmod(step - 1, data.steps_per_epoch)


def batch_of(data: TrainingData, step: int) -> Batch:
    """The global batch of a step, as it was trained on."""
    epoch, batch = place_of(data, step)
    stream = data.batches({"epoch": epoch, "step": batch})
    return next(iter(stream))


def members_of(
    data: TrainingData, step: int, ids: list[int] | None = None, most: int | None = None
) -> list[FoundSample]:
    """The samples of a step with what is in the shards, read but not decoded.

    ids: of the batch as it was made (with replacements); None: those of the order. most: only the first so many.
    """
    epoch, batch = place_of(data, step)
    start = batch * data.global_batch
    count = min(data.global_batch, most or data.global_batch)
    rows = _order(data, epoch).locate(start, start + count)
    index, spec = data.index, data._spec
    asked = [int(index.starts[spec.members[int(shard)]]) + int(within) for shard, within, _ in rows]
    ids = asked if ids is None else ids[:count]
    paths = {number: path for path, number in zip(spec.paths, spec.members)}
    starts = index.starts
    found = []
    with closing(ShardReader()) as reader:
        for place, sample_id in enumerate(ids):
            sample = index.sample(sample_id)
            shard = paths[int(starts.searchsorted(sample_id, side="right")) - 1]
            parts = (sample.image, sample.text, sample.json)
            contents = iter(reader.read_many(shard, [part for part in parts if part]))
            image, text, fields = (next(contents) if part else None for part in parts)
            is_other = sample_id != asked[place]
            copy: int | str = f"instead of {start + place}" if is_other else int(rows[place][2])
            random = keyed(spec.seed, "sample", epoch, sample_id, copy)
            options = captions.candidates(text, fields, spec.sources, spec.per_line)
            found.append(
                FoundSample(
                    place,
                    sample_id,
                    sample.key,
                    shard,
                    sample.image[0],
                    captions.choose(options, random),
                    image or b"",
                    is_other,
                )
            )
    return found


def _order(data: TrainingData, epoch: int) -> EpochOrder:
    spec = data._spec
    return EpochOrder(
        data.index.counts[list(spec.members)], spec.mixture, spec.seed, epoch, spec.open_shards, spec.window
    )


# --- `amclip samples` ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A sample of a step, with its crops and its loss."""

    sample: FoundSample
    boxes: list[list[float]]
    """top, left, height, width in source pixels: of each view, the teacher's last"""
    loss: float | None
    """image-text, mean of both directions; None: not asked for"""

    def json(self) -> dict[str, Any]:
        """For a program."""
        sample = self.sample
        return {
            "place": sample.place,
            "id": sample.sample_id,
            "key": sample.key,
            "shard": sample.shard,
            "offset": sample.offset,
            "caption": sample.caption,
            "is_replacement": sample.is_replacement,
            "boxes": self.boxes,
            "loss": self.loss,
        }


@dataclass(frozen=True)
class Shown:
    """The batch of a step."""

    run: Path
    step: int
    epoch: int
    weights_of: int | None
    """the step of the weights that the losses are by"""
    rows: list[Row]
    incidents: list[dict[str, str]]
    is_compared: bool
    """whether a checkpoint is left whose hash of the data these are held against"""

    def worst(self, number: int) -> list[Row]:
        """Those with the largest loss, the largest first."""
        return sorted(self.rows, key=lambda row: -(row.loss or 0.0))[:number]

    def json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "run": str(self.run),
            "step": self.step,
            "epoch": self.epoch,
            "weights_of_step": self.weights_of,
            "samples": [row.json() for row in self.rows],
            "incidents": self.incidents,
        }


def of_step(run: Path, step: int, overrides: list[str], has_losses: bool) -> Shown:
    """The samples of a step as they were trained on. Raises UserError where run, data or weights are not there, where
    the data are others than the run had, for a step beyond its end and for a word that is not one of FILES.
    """
    for word in overrides:
        if word.partition("=")[0] not in FILES:
            raise UserError(f"{word}: the samples would be others than the run's; {', '.join(FILES)} may be given")
    config = config_of(run)
    if overrides:
        config = for_reading(settings.load(str(run / run_files.CONFIG), overrides), run)
    module, weights_of = _towers(run) if has_losses else (None, None)
    known = hashes_of(run, step)
    with opened(config) as data:
        for name in differing(data, known):
            key, said, fix = DIFFERENCES[name]
            raise UserError(f"{key}: {said}: {fix}")
        total = settings.count_steps(config, data.steps_per_epoch)
        if step > total:
            raise UserError(f"STEP {step}: the run has {total} steps")
        batch = batch_of(data, step)
        found_samples = members_of(data, step, batch.sample_ids.tolist())
        epoch, _ = place_of(data, step)
    losses = [None] * len(found_samples) if module is None else losses_of(module, batch, config.loss.views)
    boxes = batch.boxes.transpose(0, 1).tolist()
    rows = [Row(*held) for held in zip(found_samples, boxes, losses)]
    return Shown(run, step, epoch, weights_of, rows, batch.incidents, "data" in known)


def _towers(run: Path) -> tuple[Any, int]:
    from amclip_ds.evaluate.source import build_towers, locate

    located = locate(run)
    return build_towers(located, "student"), located.step


@torch.no_grad()
def losses_of(module: Any, batch: Batch, of_views: list[int] | None, piece: int = 64) -> list[float | None]:
    """The image-text loss of each sample of a batch: the mean over views and both directions, every token kept.

    of_views: loss.views, those that meet the text; None: all.
    """
    views = photometric.apply(batch.views_uint8, batch.photometric)
    views = views if of_views is None else views[of_views]
    texts = torch.cat([module.embed_texts(part) for part in batch.token_ids.split(piece)])
    scale, labels = module.logit_scale.float().exp(), torch.arange(len(texts))
    total = torch.zeros(len(texts))
    for view in views:
        images = torch.cat([module.embed_images(part) for part in view.split(piece)])
        logits = scale * images @ texts.T
        total += F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")
    return (total / (2 * len(views))).tolist()


def lines(shown: Shown, chosen: list[Row]) -> Iterator[str]:
    """A line a sample and what is in its place."""
    by = "" if shown.weights_of is None else f"; losses by the weights of step {shown.weights_of}"
    yield f"{shown.run}: step {shown.step} (epoch {shown.epoch}), {len(shown.rows)} samples{by}"
    if not shown.is_compared:
        yield "no checkpoint is left that holds the hash of the data: whether these shards are the run's is not known"
    for row in chosen:
        sample = row.sample
        loss = "" if row.loss is None else f" loss {row.loss:.3f}"
        other = " (in place of one that cannot be used)" if sample.is_replacement else ""
        yield f"{sample.place}: id {sample.sample_id} {sample.key} in {sample.shard} at {sample.offset}{loss}{other}"
        yield f"    {one_line(sample.caption)}"


def write_page(shown: Shown, chosen: list[Row], file: Path) -> None:
    """One page with the pictures as they are in the shards, opened and made small here. Raises UserError."""
    from amclip_ds.report.page import fill

    figures = []
    for row in chosen:
        sample = row.sample
        uri, problem = _picture(sample)
        facts = f"id {sample.sample_id}, {sample.key} in {sample.shard} at {sample.offset}"
        figures.append(
            {"uri": uri, "problem": problem, "loss": row.loss, "caption": one_line(sample.caption), "facts": facts}
        )
    title = f"{shown.run.name}: step {shown.step}"
    try:
        write_atomically(file, fill("page.samples.html", title=title, figures=figures))
    except OSError as error:
        raise not_written(f"--out {file}:", error) from None


def _picture(sample: FoundSample) -> tuple[str, str]:
    """(its data: URI, "") or ("", why it cannot be shown)."""
    try:
        image = open_image(sample.image).picture()
    except ValueError as error:
        return "", str(error)
    image.thumbnail((240, 240))
    held = io.BytesIO()
    image.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}", ""
