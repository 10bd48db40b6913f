"""What the towers read and what leaves them, as tuples and dicts: in those ZeRO-3 finds the tensors it must hook.

Shapes: V views, B samples, D vision width, W text width, E embedding, K kept tokens, T tokens of a text.
A text pass is the text tower over one form of the texts: `plain`, `masked` as data.text_mask makes it, or `cloze` with
some words hidden (masks/text/cloze.py).
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amclip_ds.errors import UserError, name_of
from amclip_ds.masks.selection import Selection

Terms = dict[str, Tensor]
"""An objective's terms, each a scalar, unweighted; recorded as loss_NAME."""
FROZEN_IMAGES, FROZEN_TEXTS, FROZEN_SCALE = "frozen_images", "frozen_texts", "frozen_scale"
FROZEN = (FROZEN_IMAGES, FROZEN_TEXTS, FROZEN_SCALE)
"""what objectives may read of distill.teacher, in the order in which it follows their other targets"""
Targets = dict[str, tuple[Tensor, ...]]
"""Objective -> what the teacher made for it; the first dimension of each tensor is samples."""


class ViewGroup(NamedTuple):
    """Views that the vision tower takes together, since they keep equally many tokens."""

    views: tuple[int, ...]
    """their places in data.views"""
    images: Tensor
    """[v, B, 3, H, W] normalised"""
    selections: tuple[Selection, ...] = ()
    """how their tokens are chosen, by mask; none: every token stays, or keep_indices says"""
    keep_indices: Tensor | None = None
    """[v * B, K] tokens that were chosen before, which a second pass must repeat"""


class StudentInputs(NamedTuple):
    """What the student reads of some samples."""

    groups: tuple[ViewGroup, ...]
    texts: dict[str, Tensor]
    """text pass -> token ids [B, T]; those that some objective reads"""
    text_lengths: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """text pass -> [B] tokens of each text, as far as the host knows them"""
    progress: float = 1.0
    """how much of the run is done, 0 to 1"""

    @property
    def num_samples(self) -> int:
        return self.groups[0].images.shape[1]

    def part(self, samples: slice, kept: "tuple[Tensor | None, ...] | None" = None) -> "StudentInputs":
        """The inputs of some samples, all their views. kept: the groups' keep_indices, to be repeated."""
        groups = []
        for index, group in enumerate(self.groups):
            selections = () if kept is not None else tuple(chosen.part(samples) for chosen in group.selections)
            groups.append(ViewGroup(group.views, group.images[:, samples], selections, kept[index] if kept else None))
        texts = {name: token_ids[samples] for name, token_ids in self.texts.items()}
        lengths = {name: rows[samples] for name, rows in self.text_lengths.items()}
        return StudentInputs(tuple(groups), texts, lengths, self.progress)


class Features(NamedTuple):
    """What an objective reads; a field is None unless its `features` names it; views and text pass are its own."""

    cls: Tensor | None = None
    """[V, B, D] the class token after the last norm"""
    eot: Tensor | None = None
    """[B, W] the text at its end token"""
    image_embeds: Tensor | None = None
    """[V, B, E] fp32 rows of unit length"""
    text_embeds: Tensor | None = None
    """[B, E] the same"""
    patches: tuple[Tensor, ...] | None = None
    """by view [B, K, D]: the kept patch tokens after the last norm (per_sample alone)"""
    keep_indices: tuple[Tensor | None, ...] | None = None
    """with patches, by view: which those are, [B, K]; None: all"""
    tokens: Tensor | None = None
    """[B, T, W] the text's tokens after the last norm (per_sample alone)"""
    token_ids: Tensor | None = None
    """with tokens: [B, T]"""
    vocabulary: Tensor | None = None
    """[Y, W] the embeddings of all tokens that there are (per_sample alone)"""
    image_projected: Tensor | None = None
    """[V, B, E] the embeddings of images before they have unit length, in the dtype of the forward"""
    text_projected: Tensor | None = None
    """[B, E] the same of texts"""
    logit_scale: Tensor | None = None
    """(1,) fp32, exp'ed; with the embeddings"""
    logit_bias: Tensor | None = None
    """(1,) fp32"""
    pixels: tuple[Tensor, ...] | None = None
    """by view [B, N, p * p * 3] fp32: the normalised pixels of each patch, kept or not, row by row, the channel
    fastest (per_sample alone)"""
    progress: float = 1.0
    """how much of the run is done, 0 to 1"""


class Seen(NamedTuple):
    """What the teacher saw of its crop; a field is None unless something of the run wants it. N patches of the crop.

    Under teacher.sees=views it saw all views instead: V views follow B in every shape.
    """

    cls: Tensor | None
    """[B, D]"""
    patches: Tensor | None = None
    """[B, N, D] after the last norm"""
    scores: Tensor | None = None
    """[B, N] fp32: how much the class token attends to each patch, the mean over blocks and heads"""


class Encoded(NamedTuple):
    """What leaves the towers for some samples."""

    cls: Tensor
    """[V, B, D]"""
    eot: dict[str, Tensor]
    """by text pass [B, W]"""
    kept: tuple[Tensor | None, ...]
    """by group of views: keep_indices [v * B, K]; None: every token stayed"""
    terms: Terms
    """per-sample terms, each the mean over these samples"""
    weighted: Tensor | None
    """their weighted sum; None where no objective has any"""


class Losses(NamedTuple):
    """The loss of this rank's batch; only `total` has a gradient."""

    total: Tensor
    terms: Terms
    """every term, unweighted"""
    cls: Tensor
    """[V, B, D]: what the guards look through for samples that are not finite"""
    eot: dict[str, Tensor]
    """the same, by text pass [B, W]"""
    logit_scale: Tensor
    """(1,) fp32, exp'ed"""


def check_terms(part: Any, terms: Any) -> None:
    """Raises UserError where what an objective's `part` (a bound method) gave is not its terms."""
    if not isinstance(terms, dict):
        raise UserError(f"{name_of(part)} gave a {type(terms).__name__}, not its terms: a dict, name -> scalar tensor")
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            is_tensor = isinstance(value, Tensor)
            found = f"{value.dtype} of shape {list(value.shape)}" if is_tensor else type(value).__name__
            raise UserError(f"{name_of(part)}: its term {name!r} is a {found}; a scalar tensor of floats is needed")


def check_targets(part: Any, targets: Any, samples: int) -> None:
    """The same of `observe`: a tuple of tensors whose first dimension is samples."""
    if not isinstance(targets, tuple) or not all(isinstance(tensor, Tensor) for tensor in targets):
        raise UserError(f"{name_of(part)} gave a {type(targets).__name__}, not its targets: a tuple of tensors")
    for place, tensor in enumerate(targets):
        if not tensor.dim() or tensor.shape[0] != samples:
            raise UserError(f"{name_of(part)}: target {place} is {list(tensor.shape)}; samples come first, {samples}")


def are_finite(held: Iterable[Any]) -> bool:
    """Whether all numbers are finite; what is no tensor, or a tuple of them, does not count."""
    tensors = [tensor for one in held for tensor in (one if isinstance(one, tuple) else (one,))]
    return all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor))


def pieces_of(targets: Targets, samples: slice) -> Targets:
    """The targets of some samples."""
    return {name: tuple(tensor[samples] for tensor in held) for name, held in targets.items()}


def joined(pieces: list[Encoded]) -> tuple[Tensor, dict[str, Tensor]]:
    """(cls [V, B, D], eot by text pass [B, W]) of pieces of consecutive samples."""
    eot = {name: torch.cat([piece.eot[name] for piece in pieces]) for name in pieces[0].eot}
    return torch.cat([piece.cls for piece in pieces], dim=1), eot


def averaged(pieces: list[Encoded], sizes: list[int]) -> tuple[Terms, Tensor | None]:
    """The pieces' terms and their weighted sum, as means over all samples, without gradient."""
    shares = [size / sum(sizes) for size in sizes]
    names: Mapping[str, Any] = pieces[0].terms
    terms = {name: sum(share * piece.terms[name].detach() for share, piece in zip(shares, pieces)) for name in names}
    if pieces[0].weighted is None:
        return {}, None
    weighted = [share * piece.weighted.detach() for share, piece in zip(shares, pieces) if piece.weighted is not None]
    return terms, torch.stack(weighted).sum()  # type: ignore[return-value]
