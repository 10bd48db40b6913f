"""CLIP-KD: a frozen CLIP teaches a smaller one by its embeddings (CVPR 2024): features, interaction, relations.

Everything is over all ranks' samples. Shapes: V views, B samples of this rank, W ranks, E embedding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import ClipKDOptions, other_width
from amclip_ds.model.features import FROZEN_IMAGES, FROZEN_SCALE, FROZEN_TEXTS, Features, Terms
from amclip_ds.model.init import constant
from amclip_ds.model.towers import normalise
from amclip_ds.objectives.base import Objective
from amclip_ds.objectives.contrastive import cross_entropy


class ClipKD(Objective):
    """The student's embeddings, each view's, against the teacher's of the same view and of the texts."""

    Options = ClipKDOptions
    features = frozenset({"image_embeds", "text_embeds", "image_projected", "text_projected"})
    targets = frozenset({FROZEN_IMAGES, FROZEN_TEXTS, FROZEN_SCALE})
    init = {"kd_scale": constant(math.log(1 / 0.07))}

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        self.kd_scale = nn.Parameter(torch.zeros(1))
        if options.project_to is not None:
            self.image_map = nn.Linear(sizes.embed_dim, options.project_to)
            self.text_map = nn.Linear(sizes.embed_dim, options.project_to)

    def weight_of(self, term: str) -> float:
        return self.options.weight * getattr(self.options, f"{term.removeprefix('kd_')}_weight")

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        images, texts, scale = features.image_embeds, features.text_embeds, features.logit_scale
        assert images is not None and texts is not None and scale is not None
        seen, read, teachers_scale = targets[0].transpose(0, 1).float(), targets[1].float(), targets[2][:1].float()
        near_images, near_texts = self._in_the_teachers_space(features)
        if seen.shape[-1] != near_images.shape[-1]:
            raise UserError(other_width(seen.shape[-1], images.shape[-1], self.options.project_to))
        own = self.kd_scale.float() if self.options.raw_scale else self.kd_scale.float().exp()
        sums = [
            (
                feature(near, taught) + feature(near_texts, read),
                interactive(near, near_texts, taught, read, own, comm),
                relation((image, texts), (taught, read), scale, teachers_scale, comm),
            )
            for image, near, taught in zip(images, near_images, seen)
        ]
        means = [torch.stack(parts).mean() for parts in zip(*sums)]
        return dict(zip(("kd_feature", "kd_interactive", "kd_relation"), means))

    def _in_the_teachers_space(self, features: Features) -> tuple[Tensor, Tensor]:
        """The student's embeddings of images [V, B, E] and texts [B, E] as FD and ICL compare them, unit rows."""
        assert features.image_embeds is not None and features.text_embeds is not None
        if self.options.project_to is None:
            return features.image_embeds, features.text_embeds
        assert features.image_projected is not None and features.text_projected is not None
        return normalise(self.image_map(features.image_projected)), normalise(self.text_map(features.text_projected))


def feature(rows_BE: Tensor, taught_BE: Tensor) -> Tensor:
    """FD: the mean over samples and channels of the squared difference of unit rows."""
    return (rows_BE - taught_BE).square().mean()


def interactive(
    images_BE: Tensor, texts_BE: Tensor, taught_images_BE: Tensor, taught_texts_BE: Tensor, scale: Tensor, comm: Comm
) -> Tensor:
    """ICL: the student's images against the teacher's texts, and its texts against the teacher's images. Collective."""
    labels = comm.rank * len(texts_BE) + torch.arange(len(texts_BE), device=texts_BE.device)
    columns = comm.all_gather(taught_texts_BE.contiguous()), comm.all_gather(taught_images_BE.contiguous())
    found = [cross_entropy(rows, taught, labels, scale) for rows, taught in zip((images_BE, texts_BE), columns)]
    return (found[0] + found[1]) / 2


def relation(
    own: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor], scale: Tensor, teachers_scale: Tensor, comm: Comm
) -> Tensor:
    """CRD: KL from the teacher's distribution over all ranks' samples to the student's, both directions. Collective.

    own, taught: (images, texts) [B, E], unit rows.
    """
    columns = [comm.all_gather(rows.contiguous()) for rows in (*own, *taught)]
    total = own[0].new_zeros(())
    for row, column in ((0, 1), (1, 0)):
        ours = (scale * (own[row] @ columns[column].T)).log_softmax(-1)
        theirs = (teachers_scale * (taught[row] @ columns[2 + column].T)).softmax(-1)
        total = total + F.kl_div(ours, theirs, reduction="batchmean")
    return total / 2
