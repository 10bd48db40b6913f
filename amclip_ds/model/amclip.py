"""The student: both towers, the projections, the objectives with their heads, and the logit scale, as one module.

Shapes: V views, B samples, D vision width, W text width, E embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError, name_of
from amclip_ds.host_copies import taken
from amclip_ds.masks.selection import pixels_of
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.features import (
    Encoded,
    Features,
    Losses,
    StudentInputs,
    Targets,
    Terms,
    ViewGroup,
    are_finite,
    check_terms,
)
from amclip_ds.model.savings import Savings
from amclip_ds.model.towers import TwoTowers, normalise
from amclip_ds.model.vision import VisionTower


@dataclass(frozen=True)
class Sizes:
    """What an objective's heads are built for."""

    vision_width: int
    text_width: int
    embed_dim: int
    grid: int
    """patches along a side of a view"""
    patch: int
    """side of a patch in pixels"""
    context_length: int
    vocab_size: int


def no_objectives(sizes: Sizes) -> Mapping[str, nn.Module]:
    """Towers and projections alone, as an evaluation reads them."""
    return {}


class AClip(TwoTowers):
    """One module with one forward, so that one engine has one gradient norm, one skip decision and one step."""

    compiled_parts = ("project_images", "project_texts")

    def __init__(
        self,
        model: ModelConfig,
        build_objectives: Callable[[Sizes], Mapping[str, nn.Module]] = no_objectives,
        savings: Savings | None = None,
    ) -> None:
        """build_objectives: makes the objectives (objectives.Objective), in the order of their terms' sum."""
        super().__init__(model, savings)
        self._known_finite: set[str] = set()  # parts of plug-ins' objectives
        self.objectives = nn.ModuleDict(build_objectives(sizes_of(self.vision, model)))
        self.logit_scale = nn.Parameter(torch.zeros(1))  # (1,): a 0-d parameter crashes deepspeed.initialize
        self.logit_bias = nn.Parameter(torch.zeros(1)) if "logit_bias" in self.features() else None

    def features(self, progress: float = 1.0) -> frozenset[str]:
        """What the objectives that have begun read, all together."""
        return frozenset().union(*(objective.features for objective in self._objectives(progress).values()))

    def encode(self, inputs: StudentInputs, targets: Targets) -> Encoded:
        """Both towers over some samples, and the per-sample terms, which read tokens. targets: of the same samples."""
        wanted = self.features(inputs.progress)
        cls_only = "patches" not in wanted
        # Texts first, so that the images' backward is: its kernels are the longest, and during them the host gets so
        # far ahead of a GPU that the texts' short ones do not wait for it (docs/results/gpu-compiled.md).
        texts = {name: self._read(inputs, name) for name in inputs.texts}
        outputs = [
            self.vision(
                group.images.flatten(0, 1),
                group.selections,
                group.keep_indices,
                num_views=len(group.views),
                cls_only=cls_only,
            )
            for group in inputs.groups
        ]
        tokens = by_view(inputs.groups, [output.tokens for output in outputs])
        kept = tuple(output.keep_indices for output in outputs)
        features = Features(cls=self._features_of_views(tokens, outputs), progress=inputs.progress)
        if "patches" in wanted:
            features = features._replace(
                patches=tuple(view[:, 1:] for view in tokens), keep_indices=tuple(by_view(inputs.groups, kept))
            )
        if "pixels" in wanted:
            images = by_view(inputs.groups, [group.images.flatten(0, 1) for group in inputs.groups])
            features = features._replace(pixels=tuple(pixels_of(view, self.vision.grid) for view in images))
        terms, weighted = self._per_sample(features, texts, targets, inputs.progress)
        assert features.cls is not None
        eot = {name: text.eot for name, text in texts.items() if text.eot is not None}
        return Encoded(features.cls, eot, kept, terms, weighted)

    def _read(self, inputs: StudentInputs, name: str) -> Features:
        """One text pass, with its tokens where an objective reads them."""
        token_ids = inputs.texts[name]
        readers = [reader for reader in self._objectives(inputs.progress).values() if reader.text_pass == name]
        if any("tokens" in reader.features for reader in readers):
            tokens, eot = self.text.encode(token_ids, readers[0].hidden() if name == "cloze" else None)
            is_read = any("vocabulary" in reader.features for reader in readers)
            vocabulary = self.text.vocabulary(token_ids.device) if is_read else None
            return Features(eot=eot, tokens=tokens, token_ids=token_ids, vocabulary=vocabulary)
        return Features(eot=self.text(token_ids, inputs.text_lengths.get(name)), token_ids=token_ids)

    def losses(
        self,
        cls: Tensor,
        eot: dict[str, Tensor],
        targets: Targets,
        sample_terms: Terms,
        sample_loss: Tensor | None,
        comm: Comm,
        progress: float = 1.0,
    ) -> Losses:
        """The loss of this rank's whole batch. Collective: every rank must call.

        cls: [V, B, D]; eot: each text pass's [B, W]. sample_terms, sample_loss: the per-sample terms of the batch and
        their weighted sum, from encode.
        progress: how much of the run is done, 0 to 1.
        """
        found: dict[str, Terms] = {}
        objectives = self._objectives(progress)
        for name in in_order(objectives):
            objective = objectives[name]
            features = self._features_of_batch(objective, cls, eot.get(objective.text_pass or ""))
            features = features._replace(progress=progress)
            found[name] = objective(features, targets.get(name, ()), comm)
            self._check_terms(type(objective).forward, found[name], features)
        total, terms = sample_loss, dict(sample_terms)
        for name, objective in objectives.items():
            for term, value in found[name].items():
                weighted = objective.weight_of(term) * value
                total = weighted if total is None else total + weighted
                check_new(term, terms, objective)
                terms[term] = value.detach()
        assert total is not None, "no objective gave a term"
        seen = {name: feature.detach() for name, feature in eot.items()}
        return Losses(total, terms, cls.detach(), seen, self.logit_scale.detach().float().exp())

    def encode_and_losses(
        self, inputs: StudentInputs, targets: Targets, comm: Comm
    ) -> tuple[Losses, tuple[Tensor | None, ...]]:
        """encode, then losses, of a batch that is held whole; and the groups' keep_indices. Collective."""
        encoded = self.encode(inputs, targets)
        losses = self.losses(encoded.cls, encoded.eot, targets, encoded.terms, encoded.weighted, comm, inputs.progress)
        return losses, encoded.kept

    def choose(self, group: ViewGroup) -> Tensor | None:
        """The tokens that stay of some views, [v * B, K]; None: all. The tower runs whole, though its first layer
        decides: ZeRO-3 gathers ahead what follows in it."""
        return self.vision(group.images.flatten(0, 1), group.selections, num_views=len(group.views)).keep_indices

    def _features_of_views(self, tokens: list[Tensor], outputs: list[Any]) -> Tensor:
        """[V, B, D]; of one group of views computed on its output as it is, without a copy."""
        if len(outputs) == 1:
            return self.vision.feature(outputs[0].tokens.unflatten(0, (len(tokens), -1)))
        return torch.stack([self.vision.feature(view) for view in tokens])

    def _objectives(self, progress: float) -> dict[str, Any]:
        """Those that have begun."""
        objectives: dict[str, Any] = dict(self.objectives.items())
        return {name: objective for name, objective in objectives.items() if objective.is_on(progress)}

    def _per_sample(
        self, features: Features, texts: dict[str, Features], targets: Targets, progress: float
    ) -> tuple[Terms, Tensor | None]:
        terms: Terms = {}
        total = None
        for name, objective in self._objectives(progress).items():
            text = texts.get(objective.text_pass or "", Features())
            own = given(features, text, objective)
            found = objective.per_sample(own, targets.get(name, ()))
            self._check_terms(type(objective).per_sample, found, own)
            for term, value in found.items():
                weighted = objective.weight_of(term) * value
                total = weighted if total is None else total + weighted
                check_new(term, terms, objective)
                terms[term] = value.detach()
        return terms, total

    def _check_terms(self, part: Any, terms: Any, features: Features) -> None:
        """Raises UserError where a part of an objective did not give terms; of one that is not ours also where the
        first are not finite though what it read is. Later ones are left to the guards, which skip a step."""
        check_terms(part, terms)
        name = name_of(part)
        if terms and name not in self._known_finite and not name.startswith("amclip_ds."):
            if not are_finite(terms.values()) and are_finite(features):
                raise UserError(f"{name} gave {', '.join(terms)} not finite, of finite features; fix it there")
            self._known_finite.add(name)

    def _features_of_batch(self, objective: Any, cls: Tensor, eot: Tensor | None) -> Features:
        """What an objective's forward reads; the embeddings are made here, of its views."""
        wanted = objective.features
        cls = of_views(cls, objective.chosen_views)
        features = Features(cls=cls, eot=eot)
        if "image_embeds" in wanted:
            embeds, rows = self.project_images(cls)
            features = features._replace(image_embeds=embeds)
            if "image_projected" in wanted:
                features = features._replace(image_projected=rows)
        if "text_embeds" in wanted:
            assert eot is not None
            embeds, rows = self.project_texts(eot)
            features = features._replace(text_embeds=embeds)
            if "text_projected" in wanted:
                features = features._replace(text_projected=rows)
        if "image_embeds" in wanted or "text_embeds" in wanted:
            features = features._replace(logit_scale=self.logit_scale.float().exp())
        if "logit_bias" in wanted:
            assert self.logit_bias is not None
            features = features._replace(logit_bias=self.logit_bias.float())
        return features

    def project_images(self, cls: Tensor) -> tuple[Tensor, Tensor]:
        """[V, B, D] -> embeddings [V, B, E], fp32 rows of unit length, and what they were before."""
        rows = self.image_projection(cls.flatten(0, 1))
        return normalise(rows).unflatten(0, cls.shape[:2]), rows.unflatten(0, cls.shape[:2])

    def project_texts(self, eot: Tensor) -> tuple[Tensor, Tensor]:
        """[B, W] -> embeddings [B, E], fp32 rows of unit length, and what they were before."""
        rows = self.text_projection(eot)
        return normalise(rows), rows


def in_order(objectives: Mapping[str, Any]) -> list[str]:
    """The order of the objectives' forwards: those on the embeddings last.

    Autograd sums a feature's gradients beginning with its last reader: the order is part of the numbers.
    """
    return sorted(objectives, key=lambda name: "image_embeds" in objectives[name].features)


def check_new(term: str, terms: Terms, objective: Any) -> None:
    """Raises UserError for a second term of one name, which could not be recorded."""
    if term in terms:
        raise UserError(f"{name_of(type(objective))}: another part of the loss has a term {term!r} already; rename it")


def by_view(groups: tuple[ViewGroup, ...], held: Sequence[Tensor | None]) -> list[Any]:
    """What each group's rows are, [v * B, ...], view by view in the order of data.views, [B, ...]."""
    found: dict[int, Tensor | None] = {}
    for group, rows in zip(groups, held):
        parts = [None] * len(group.views) if rows is None else rows.unflatten(0, (len(group.views), -1)).unbind(0)
        found |= dict(zip(group.views, parts))
    return [found[view] for view in sorted(found)]


def of_views(cls: Tensor, views: tuple[int, ...] | None) -> Tensor:
    """[V, B, D] of some views; of all of them in order: the tensor as it is."""
    return cls if views is None else taken(cls, views)


def given(features: Features, text: Features, objective: Any) -> Features:
    """What an objective's per_sample reads: the features that it names, of its views and of its text pass."""
    views, wanted = objective.chosen_views, objective.features
    assert features.cls is not None
    chosen = tuple(range(features.cls.shape[0])) if views is None else views
    patches: Any = features.patches
    kept: Any = features.keep_indices
    pixels: Any = features.pixels
    is_by_patch = "patches" in wanted
    return Features(
        cls=of_views(features.cls, views) if "cls" in wanted else None,
        eot=text.eot if "eot" in wanted else None,
        patches=tuple(patches[view] for view in chosen) if is_by_patch else None,
        keep_indices=tuple(kept[view] for view in chosen) if is_by_patch else None,
        tokens=text.tokens if "tokens" in wanted else None,
        token_ids=text.token_ids if "tokens" in wanted else None,
        vocabulary=text.vocabulary if "vocabulary" in wanted else None,
        pixels=tuple(pixels[view] for view in chosen) if "pixels" in wanted else None,
        progress=features.progress,
    )


def sizes_of(vision: VisionTower, model: ModelConfig) -> Sizes:
    return Sizes(
        vision_width=vision.width,
        text_width=model.text.width,
        embed_dim=model.embed_dim,
        grid=vision.grid,
        patch=vision.patch_size,
        context_length=model.text.context_length,
        vocab_size=model.text.vocab_size,
    )
