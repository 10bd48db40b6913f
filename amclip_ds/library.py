"""The Python interface: `amclip_ds.load(SOURCE)` gives a Model that embeds images and texts, without DeepSpeed.

    model = amclip_ds.load("runs/aclip-vitb16", weights="teacher")
    images, texts = model.encode_image(pictures), model.encode_text(["a red circle", "a dog"])
    probabilities = model.zero_shot(pictures, ["circle", "dog"])

It encodes as `amclip eval` does, batch by batch of one size, so the embeddings are the same to the bit.

Shapes: N images or texts, C classes, E embedding, T tokens, H the side of an image, g patches along it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.data import photometric
from amclip_ds.errors import UserError, in_one_line
from amclip_ds.evaluate import names
from amclip_ds.evaluate.encoder import Encoder, TowerEncoder, encode_images, encode_texts, token_ids
from amclip_ds.evaluate.source import Located, locate, open_encoder
from amclip_ds.evaluate.zero_shot import build_classifier
from amclip_ds.images import as_rgb

BATCH = 64  # as `amclip eval --batch-size`
Images = Sequence[Image.Image] | Image.Image | Tensor


@dataclass(frozen=True)
class _Given:
    """A picture where evaluation expects a sample of a set."""

    image: Image.Image
    place: str

    def read(self) -> Image.Image:
        return self.image


class Model:
    """One set of weights, on one device, in eval mode and fp32."""

    def __init__(self, located: Located, encoder: Encoder, device: torch.device) -> None:
        self._located, self._encoder, self.device = located, encoder, device
        self.weights: str = encoder.weights
        """student | teacher"""
        self.kind: str = located.kind
        """run | checkpoint | open_clip | hf | timm | onnx"""
        self.step: int = located.step
        self.image_size: int = encoder.image_size

    def __repr__(self) -> str:
        return f"amclip_ds.Model({str(self._located.path)!r}, {self.kind}, {self.weights}, step {self.step})"

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture -> uint8 [3, H, H]: upright, transparent parts on white, shortest side resized, centre cut."""
        return self._encoder.preprocess(_shown(image, "the image"))

    def tokenizer(self, texts: Sequence[str]) -> Tensor:
        """Texts -> token ids [N, T], as the text tower takes them. Raises UserError."""
        self._check_reads_texts("tokenizer")
        listed = _texts(texts)
        if isinstance(self._encoder, TowerEncoder):
            return token_ids(tuple(listed), self._encoder.context_length).clone()
        return self._encoder.tokenise(listed)  # type: ignore[attr-defined]

    def encode_image(self, images: Images, batch_size: int = BATCH) -> Tensor:
        """Pictures, or a tensor [N, 3, H, H] of what `preprocess` gives (uint8, or float and normalised by mean and
        deviation of ImageNet) -> fp32 rows of unit length [N, E]. Raises UserError.
        """
        _check_batch(batch_size)
        if isinstance(images, Tensor):
            return self._of_tensor(images, batch_size)
        samples = [_Given(_shown(image, place), place) for place, image in _placed(images)]
        return encode_images(self._encoder, samples, batch_size, SingleProcess()).cpu()  # type: ignore[arg-type]

    def encode_text(self, texts: Sequence[str], batch_size: int = BATCH) -> Tensor:
        """Texts -> fp32 rows of unit length [N, E]. Raises UserError."""
        self._check_reads_texts("encode_text")
        _check_batch(batch_size)
        return encode_texts(self._encoder, _texts(texts), batch_size, SingleProcess()).cpu()

    def zero_shot(
        self, images: Images, classes: Sequence[str], templates: Sequence[str] | None = None, batch_size: int = BATCH
    ) -> Tensor:
        """Probabilities [N, C] of the classes, in their order.

        templates: prompts with `{c}` for the class name; by default CLIP's choice of 7, as `amclip eval`'s.
        Raises UserError.
        """
        self._check_reads_texts("zero_shot")
        prompts = names.templates(Path(), names.OPENAI_7, "") if templates is None else tuple(_texts(templates))
        if any("{c}" not in prompt for prompt in prompts):
            raise UserError("zero_shot: each of the templates has {c} for the class name")
        rows = self.encode_image(images, batch_size)
        classifier = build_classifier(self._encoder, tuple(_texts(classes)), prompts, batch_size, SingleProcess())
        return (self.logit_scale * rows @ classifier.cpu().T).softmax(-1)

    def attention(self, images: Images, batch_size: int = BATCH) -> Tensor:
        """How much CLS attends to each patch [N, g, g], the mean over all blocks and heads: what attentive masks keep
        by. Raises UserError for an export, whose library does not give it.
        """
        if not isinstance(self._encoder, TowerEncoder):
            raise UserError(f"attention: {self.kind} does not give it; load the run or the checkpoint")
        _check_batch(batch_size)
        towers: torch.nn.Module = self._encoder.towers  # type: ignore[assignment]
        if not isinstance(images, Tensor):
            images = torch.stack([self._encoder.preprocess(_shown(image, place)) for place, image in _placed(images)])
        found = []
        with torch.no_grad():
            for part in self._checked(images).split(batch_size):
                shown = part.to(self.device)
                shown = photometric.normalise(shown) if shown.dtype == torch.uint8 else shown
                found.append(towers.vision(shown, with_scores=True).scores.cpu())  # type: ignore[operator]
        maps = torch.cat(found)
        side = round(maps.shape[1] ** 0.5)
        return maps.unflatten(1, (side, side))

    @property
    def logit_scale(self) -> float:
        """What similarities are multiplied by; a teacher's is its student's. Raises UserError."""
        self._check_reads_texts("logit_scale")
        return self._encoder.logit_scale()  # type: ignore[attr-defined]

    def _check_reads_texts(self, what: str) -> None:
        """Raises UserError for an export of the image tower alone."""
        if getattr(self._encoder, "is_tower_alone", False):
            raise UserError(f"{what}: {self.kind} holds the image tower alone; load the run or another export")

    def _of_tensor(self, images: Tensor, batch_size: int) -> Tensor:
        rows = []
        for part in self._checked(images).split(batch_size):
            missing = part.new_zeros(batch_size - len(part), *part.shape[1:])  # one size of batch, as evaluation's
            rows.append(self._encoder.image(torch.cat([part, missing]))[: len(part)].cpu())
        return torch.cat(rows)

    def _checked(self, images: Tensor) -> Tensor:
        size = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size) or not len(images):
            raise UserError(f"images of the shape {list(images.shape)}; it is [N, 3, {size}, {size}]")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(f"images of {images.dtype}; it is uint8, or float and normalised")
        return images if images.dtype == torch.uint8 else images.float()


def load(source: str | Path, weights: str | None = None, device: str | torch.device | None = None) -> Model:
    """A model from a run's folder, a checkpoint's, an export's, or `hf-hub:ORG/NAME`. Loads no DeepSpeed.

    weights: student | teacher; None: the teacher where the source holds one. device: the GPU where there is one.
    Raises UserError for what is missing, damaged, or no model.
    """
    located = locate(source)
    held = located.weights
    chosen = weights or ("teacher" if "teacher" in held else held[0])
    if chosen not in held:
        raise UserError(f"weights: {located.path} holds {' and '.join(held)}, no {chosen}")
    place = _place(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(located, open_encoder(located, chosen, place), place)


def _check_batch(batch_size: int) -> None:
    """Raises UserError for what is no size of a batch."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise UserError(f"batch_size: {batch_size!r}; a whole number of 1 or more")


def _place(device: str | torch.device) -> torch.device:
    """The device, which is there. Raises UserError."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without it
        raise UserError(f"device: {device}: {in_one_line(error, 200)}") from None


def _placed(images: Sequence[Image.Image] | Image.Image) -> list[tuple[str, Image.Image]]:
    """What messages call each picture, and the picture."""
    try:
        given = [images] if isinstance(images, Image.Image) else list(images)
    except TypeError:
        raise UserError(
            f"images: a {type(images).__name__}, where PIL images are expected (Image.open(PATH))"
        ) from None
    if not given:
        raise UserError("images: no image was given")
    return [(f"image {number}", image) for number, image in enumerate(given)]


def _shown(image: Image.Image, place: str) -> Image.Image:
    """A picture as training sees it: upright, in RGB, on white."""
    if not isinstance(image, Image.Image):
        raise UserError(f"{place}: a {type(image).__name__}, where a PIL image is expected (Image.open(PATH))")
    if 0 in image.size:
        raise UserError(f"{place}: {image.width} x {image.height} pixels, so there is nothing in it")
    try:
        return as_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError) as error:  # ValueError: a closed file, or colours that Pillow does not convert
        raise UserError(f"{place}: {error}") from None


def _texts(texts: Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, Iterable) else []
    if not listed or not all(isinstance(text, str) for text in listed):
        raise UserError("texts: a list of str, one at least")
    return listed
