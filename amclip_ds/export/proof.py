"""Does the other library compute the same? Unit embeddings of real images and texts, ours against theirs.

First on the same pixel tensors and token ids, where they must agree within 1e-5; then through the library's own
preprocessing and tokenizer, where a difference is reported and only a large one is a mismatch.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from amclip_ds.config import TrainConfig
from amclip_ds.data import photometric
from amclip_ds.errors import AmclipError, UserError
from amclip_ds.evaluate.datasets import RETRIEVAL, open_set
from amclip_ds.evaluate.encoder import resize_and_crop, tokenizer
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.towers import normalise
from amclip_ds.shards.sources import expand_local, split_sources

TOLERANCE = 1e-5  # largest difference of unit vectors, fp32
OWN_COSINE = 0.999  # through the library's own preprocessing
NUM_SAMPLES, BATCH = 64, 16


class ExportMismatch(AmclipError):
    """The export does not compute what the model does; it was deleted."""


@dataclass
class Agreement:
    """How far two sets of unit vectors agree."""

    what: str
    cosine: float
    """the lowest"""
    max_difference: float
    must: str
    """equal: within TOLERANCE | close: a cosine of OWN_COSINE | reported: not judged"""

    @property
    def holds(self) -> bool:
        """NaN does not."""
        holds = {"equal": self.max_difference <= TOLERANCE, "close": self.cosine >= OWN_COSINE, "reported": True}
        return holds[self.must]

    def line(self) -> str:
        verdict = "" if self.holds else "  MISMATCH"
        return f"{self.what}: cosine {self.cosine:.7f}, largest difference {self.max_difference:.2e}{verdict}"


@dataclass
class Proof:
    """What was compared."""

    samples: str
    agreements: list[Agreement]
    logit_scale: tuple[float, float] | None
    """ours, theirs"""
    equal_token_rows: tuple[int, int] | None
    """texts whose ids agree up to the end token, of how many"""

    @property
    def holds(self) -> bool:
        scale_holds = self.logit_scale is None or abs(self.logit_scale[0] - self.logit_scale[1]) <= TOLERANCE
        return scale_holds and all(agreement.holds for agreement in self.agreements)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"on {self.samples}:", *(f"  {agreement.line()}" for agreement in self.agreements)]
        if self.logit_scale is not None:
            lines.append(f"  logit scale: {self.logit_scale[0]:.6f}, theirs {self.logit_scale[1]:.6f}")
        if self.equal_token_rows is not None:
            lines.append("  token ids up to the end token: {} of {} texts equal".format(*self.equal_token_rows))
        return lines

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class Samples:
    """Images and texts to compare on."""

    images: list[Image.Image]
    texts: list[str]
    origin: str


def gather_samples(spec: str | None, config: TrainConfig) -> Samples:
    """NUM_SAMPLES images with a caption each: of the shards named, else of the run's own training shards, else made."""
    if spec is None:
        spec = _first_local_shard(config)
    if spec is None:
        return _made_samples(config.model.vision.image_size)
    found = [sample for sample in open_set(spec, task=RETRIEVAL, key="--proof").samples if sample.captions]
    chosen = found[:: max(1, len(found) // NUM_SAMPLES)][:NUM_SAMPLES]
    return Samples(
        [sample.read() for sample in chosen],
        [sample.captions[0] for sample in chosen],
        f"{len(chosen)} images and captions of {spec}",
    )


def _first_local_shard(config: TrainConfig) -> str | None:
    """The first training shard, where it is a readable file."""
    if not config.data.train:
        return None
    try:
        shard = expand_local(split_sources(config.data.train)[0], "data.train")[0]
        open_set(shard, task=RETRIEVAL)
    except UserError:
        return None
    return shard


def _made_samples(image_size: int) -> Samples:
    from amclip_ds.data.synthetic import SceneConfig, make_scene

    made = [make_scene(SceneConfig(image_size=max(64, image_size)), "test", n) for n in range(NUM_SAMPLES)]
    origin = f"{len(made)} synthetic scenes (no training shard is available; --proof names real ones)"
    return Samples([scene.image for scene in made], [scene.caption for scene in made], origin)


@torch.no_grad()
def prove(module: AClip, model: ModelConfig, library: Any, samples: Samples) -> Proof:
    """Compares our module with a library's encoder (evaluate/libraries.py)."""
    size = model.vision.image_size
    pixels = photometric.normalise(torch.stack([resize_and_crop(image, size) for image in samples.images]))
    if library.is_tower_alone:
        image = normalise(_batched(lambda x: module.vision.feature(module.vision(x).tokens), pixels))
    else:
        image = _batched(lambda x: module.embed_images(x), pixels)
    agreements = [_agree("images, same pixels", image, normalise(_batched(library.embed_pixels, pixels)), "equal")]
    own = normalise(_batched(library.embed_pixels, torch.stack([library.library_pixels(i) for i in samples.images])))
    alike = torch.tensor([library.same_center_crop(i) for i in samples.images])
    for what, rows, must in (("", alike, "close"), (", where it crops a pixel aside", ~alike, "reported")):
        if rows.any():
            what = f"images, its own preprocessing{what} ({int(rows.sum())} images)"
            agreements.append(_agree(what, image[rows], own[rows], must))
    if library.is_tower_alone:
        return Proof(samples.origin, agreements, None, None)
    ids = tokenizer()(samples.texts, model.text.context_length)
    text = _batched(lambda x: module.embed_texts(x), ids)
    agreements.insert(1, _agree("texts, same token ids", text, normalise(_batched(library.embed_ids, ids)), "equal"))
    own_ids = library.tokenise(samples.texts)
    end = model.text.eos_token_id
    equal = [_up_to_end(ours, end) == _up_to_end(theirs, end) for ours, theirs in zip(ids, own_ids)]
    same = torch.tensor(equal)
    if same.any():  # what another cleaning of the text makes different is counted, not compared
        theirs = normalise(_batched(library.embed_ids, own_ids[same]))
        agreements.append(_agree("texts, its own tokenizer", text[same], theirs, "close"))
    scale = float(module.logit_scale.float().exp()), library.logit_scale()
    return Proof(samples.origin, agreements, scale, (sum(equal), len(equal)))


def _up_to_end(ids: Tensor, end: int) -> list[int]:
    row = ids.tolist()
    return row[: row.index(end) + 1] if end in row else row


def _batched(forward: Any, rows: Tensor) -> Tensor:
    return torch.cat([forward(part) for part in rows.split(BATCH)])


def _agree(what: str, ours: Tensor, theirs: Tensor, must: str) -> Agreement:
    cosine = (ours.double() * theirs.double()).sum(-1).min()
    return Agreement(what, float(cosine), float((ours - theirs).abs().max()), must)
