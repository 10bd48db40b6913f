"""A second teacher that stays as it is: a finished model whose embeddings objectives read (distill.teacher): a run or a
checkpoint of ours, or an export for open_clip or transformers, of whichever model.

Every rank holds it whole, in fp32. Shapes: V views, B samples, E the teacher's embedding.
"""

import hashlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.data.captions import build_tokenizer
from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.errors import UserError
from amclip_ds.evaluate.libraries import Library
from amclip_ds.evaluate.source import Located, build_towers, locate, open_encoder
from amclip_ds.model.amclip import AClip, by_view
from amclip_ds.model.config import ModelConfig, check_teacher_fits
from amclip_ds.model.features import FROZEN_IMAGES, FROZEN_SCALE, FROZEN_TEXTS, StudentInputs

WITH_BOTH_TOWERS = ("open_clip", "hf")
TRIED = ("A photo of two dogs.", "Z\u00fcrich, 3 o'clock!")  # captions whose ids distinguish tokenizers


class Towers(Protocol):
    """Both towers, frozen."""

    @property
    def model(self) -> nn.Module:
        """Whose they are."""
        ...

    @property
    def logit_scale(self) -> Tensor:
        """(1,) its logarithm."""
        ...

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised as ours -> [B, E], fp32 rows of unit length."""
        ...

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, E] the same."""
        ...


class FrozenTeacher:
    """Reads the student's own views, with their colour changes and without a mask, and the plain texts."""

    def __init__(self, source: str, student: ModelConfig, device: torch.device) -> None:
        """source: a run, a checkpoint or an export; of the two that a run may hold, its teacher. Raises UserError."""
        try:
            located = locate(source)
            self.towers: Towers = _library(located, student, device) or _own(located, student, device)
        except UserError as error:
            text = str(error)
            raise type(error)(text if text.startswith("distill.teacher: ") else f"distill.teacher: {text}") from None
        self.about = f"distill.teacher: the {located.weights[-1]} of {located.path}, step {located.step}, frozen"

    def hash_weights(self) -> str:
        """sha256 of its weights: a resume sees that a teacher was trained further, or is another one."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.towers.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def embed(self, inputs: StudentInputs, token_ids: Tensor, micro: int) -> dict[str, Tensor]:
        """{FROZEN_IMAGES: [B, V, E], FROZEN_TEXTS: [B, E]}, fp32 rows of unit length, and FROZEN_SCALE: [B, 1], the
        teacher's logit scale, exp'ed; micro: samples at a time."""
        images = torch.stack(
            by_view(inputs.groups, [group.images.flatten(0, 1) for group in inputs.groups])
        )  # [V, B, ...]
        seen, read = [], []
        for start in range(0, images.shape[1], micro):
            piece = images[:, start : start + micro]
            rows = self.towers.embed_images(piece.flatten(0, 1)).unflatten(0, piece.shape[:2])
            seen.append(rows.transpose(0, 1))
            read.append(self.towers.embed_texts(token_ids[start : start + micro]))
        scale = self.towers.logit_scale.detach().float().exp().expand(images.shape[1], 1)
        return {FROZEN_IMAGES: torch.cat(seen), FROZEN_TEXTS: torch.cat(read), FROZEN_SCALE: scale}


def check_export(source: str) -> None:
    """Raises UserError for what is no export that can teach."""
    try:
        check_kind(locate(source))
    except UserError as error:
        raise type(error)(f"distill.teacher: {error}") from None


def check_kind(located: Located) -> None:
    """Raises UserError for an export that lacks a tower."""
    if located.config is None and located.kind not in WITH_BOTH_TOWERS:
        raise UserError(f"{located.path} is an export for {located.kind}; name one for open_clip or transformers")


def _own(located: Located, student: ModelConfig, device: torch.device) -> Towers:
    assert located.config is not None
    check_teacher_fits(located.config.model, student, str(located.path))
    return OwnTowers(build_towers(located, located.weights[-1], device), located.config.model.vision.image_size)


def _library(located: Located, student: ModelConfig, device: torch.device) -> "LibraryTowers | None":
    """The towers of an export; None: it is none."""
    if located.config is not None:
        return None
    check_kind(located)
    library = open_encoder(located, located.weights[-1], device)
    assert isinstance(library, Library)
    return LibraryTowers(library, student)


class OwnTowers:
    """A model of ours, which sees pixels of the size that it was trained on."""

    def __init__(self, model: AClip, image_size: int) -> None:
        self.model, self.image_size, self.logit_scale = model, image_size, model.logit_scale

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised -> [B, E], fp32 rows of unit length."""
        return self.model.embed_images(_resized(images, self.image_size))

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, E] the same."""
        return self.model.embed_texts(token_ids)


class LibraryTowers:
    """A library's model, which sees pixels of its own size, mean and deviation, and our token ids."""

    def __init__(self, library: Library, student: ModelConfig) -> None:
        """Raises UserError for a tokenizer that is not CLIP's, and for texts that it cannot take."""
        self.library, self.model = library, library.model
        tokenizer, length = build_tokenizer(), student.text.context_length
        theirs = library.tokenise(list(TRIED))
        self.context_length = theirs.shape[1]
        if self.context_length < length:
            raise UserError(
                f"{library.path} reads texts of {self.context_length} tokens, the student of {length}; set"
                f" model.text.context_length={self.context_length}"
            )
        for text, row in zip(TRIED, theirs.tolist()):
            ids = tokenizer.encode(text)
            if row[: len(ids) + 2] != [tokenizer.start, *ids, tokenizer.end]:
                raise UserError(
                    f"{library.path} has another tokenizer than CLIP's, and the student reads CLIP's tokens"
                )
        mean, std = (torch.tensor(list(part), device=library.device).view(3, 1, 1) for part in library.mean_std)
        own_mean, own_std = (torch.tensor(part, device=library.device).view(3, 1, 1) for part in (MEAN, STD))
        self.factor, self.shift = own_std / std, (own_mean - mean) / std
        self.logit_scale = torch.tensor([library.logit_scale()], device=library.device).log()

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] normalised as ours -> [B, E], fp32 rows of unit length."""
        return self.library.image(_resized(images, self.library.image_size) * self.factor + self.shift)

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, E] the same."""
        filled = F.pad(token_ids, (0, self.context_length - token_ids.shape[1]))
        with self.library._blamed():
            return F.normalize(self.library.embed_ids(filled).float(), dim=-1)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
