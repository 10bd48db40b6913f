"""DetailCLIP: what each view lacks is predicted as pixels and as the teacher's prototypes, and its class token as the
teacher's of the other view (arXiv 2409.06809; KishoreP1/DetailCLIP b66fd64).

The teacher sees the whole views themselves (teacher.sees=views). Shapes: V views, B samples, N patches, K kept,
D width, d bottleneck of the head, P prototypes.
"""

import math
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.errors import UserError
from amclip_ds.host_copies import taken
from amclip_ds.model.amclip import Sizes
from amclip_ds.model.config import DetailCLIPOptions
from amclip_ds.model.features import Features, Seen, Terms
from amclip_ds.model.init import constant, normal, xavier
from amclip_ds.objectives.base import Objective, start_of
from amclip_ds.objectives.patches import PatchDecoder

PIXEL_EPS = 1e-6
ENTROPY = "detail_entropy"  # of the teacher's mean distribution, by its largest: 1 all prototypes alike, 0 one of them
INFORMATION = "detail_information"  # that, less the mean entropy of its distributions: 0 where all samples look alike


class DetailCLIP(Objective):
    """Pixels, patch prototypes and class prototypes; each has a weight, and at 0 what it alone needs is not built."""

    Options = DetailCLIPOptions
    features = frozenset({"cls", "patches", "pixels"})
    targets = frozenset({"cls", "patches"})
    sees = "views"
    averaged: tuple[str, ...] = ("head",)  # type: ignore[misc]  # of the instance: without prototypes there is none
    init = {
        r"decoder\.mask_token": normal(0.02),
        r"decoder\.(embed|blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]))\.weight": xavier,
        r"head\.mlp\.\d\.weight": normal(0.02),
        r"(patch_)?centre": constant(0.0),
    }

    def __init__(self, options: Any, sizes: Sizes) -> None:
        super().__init__(options, sizes)
        width, heads = sizes.vision_width, options.decoder_heads
        if options.patch_weight or options.pixel_weight:
            if width % heads:
                raise UserError(f"loss.detailclip.decoder_heads: {heads} does not divide the width {width}")
            self.decoder = PatchDecoder(width, sizes.grid, options.depth, nn.Identity(), heads, by_axis=True)
        if options.pixel_weight:
            self.pixels = nn.Linear(width, 3 * sizes.patch**2)
        if options.has_prototypes:
            self.head = PrototypeHead(width, options.hidden_dim, options.bottleneck_dim, options.prototypes)
            self.register_buffer("centre", torch.zeros(options.prototypes))
            self.register_buffer("patch_centre", torch.zeros(options.prototypes))
        else:
            self.averaged = ()  # nothing of it reads an average
        self._means: Tensor | None = None  # of the last batch, until commit: no state

    @classmethod
    def changes_at(cls, options: Any) -> tuple[float, ...]:
        """Where it begins, and where the patches' temperature changes."""
        return (start_of(options), start_of(options) + options.warmup)

    def weight_of(self, term: str) -> float:
        if term in (ENTROPY, INFORMATION):
            return 0.0  # recorded alone
        return self.options.weight * getattr(self.options, f"{term.removeprefix('detail_')}_weight")

    def observe(self, copies: nn.ModuleDict, seen: Seen, comm: Comm) -> tuple[Tensor, ...]:
        """(what enters the prototypes [B, V, 1 + N, d], the averaged prototypes, one for all samples [B, P, d])."""
        if not self.options.has_prototypes:
            return ()
        assert seen.cls is not None and seen.patches is not None
        head: Any = copies["head"]
        tokens = torch.cat([seen.cls[:, :, None], seen.patches], dim=2)
        if self.chosen_views is not None:
            tokens = taken(tokens, self.chosen_views, dim=1)
        return head(tokens), head.prototypes().expand(len(tokens), -1, -1)

    def per_sample(self, features: Features, targets: tuple[Tensor, ...]) -> Terms:
        assert features.cls is not None and features.patches is not None and features.pixels is not None
        terms: Terms = {}
        if self.options.patch_weight or self.options.pixel_weight:
            decoded = [
                self._decoded(*view) for view in zip(features.cls, features.patches, features.keep_indices or ())
            ]
            if self.options.pixel_weight:
                terms["detail_pixel"] = torch.stack(
                    [self._pixels(*view, of) for view, of in zip(decoded, features.pixels)]
                ).mean()
            if self.options.patch_weight:
                terms["detail_patch"] = self._patches(decoded, targets, features.progress)
        if self.options.cls_weight:
            terms["detail_cls"] = self._classes(features.cls, targets)
        return terms

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        """The means that move the centres; and how evenly the teacher uses its prototypes, which has no weight."""
        if not targets:
            return {}
        inside, prototypes = targets
        by_token = inside.float().mean(dim=(0, 1))  # logits are linear: their means are the means' logits
        means = torch.stack([by_token[0], by_token[1:].mean(0)]) @ prototypes[0].float().T
        taught = self._taught(inside[:, :, 0], prototypes, self.centre, self.options.teacher_temperature)
        means = comm.all_reduce_sum(torch.cat([means, taught.mean((0, 1))[None]])) / comm.world_size
        self._means = means[:2]
        most = math.log(self.options.prototypes)
        entropy = torch.special.entr(means[2]).sum() / most
        each = comm.all_reduce_sum(torch.special.entr(taught).sum(-1).mean()[None])[0] / comm.world_size
        return {ENTROPY: entropy, INFORMATION: entropy - each / most}

    def commit(self, comm: Comm) -> None:
        if self._means is not None:
            centres: Any = (self.centre, self.patch_centre)
            for centre, mean in zip(centres, self._means):
                centre.lerp_(mean, 1 - self.options.centre_momentum)

    def _decoded(self, cls_BD: Tensor, patches_BKD: Tensor, keep_BK: Tensor | None) -> tuple[Tensor, Tensor]:
        """The decoder's tokens at removed places [B, N - K, D], and those places."""
        if keep_BK is None:
            raise UserError("loss.detailclip.weight: a view that it reads keeps every token; give it a mask")
        return self.decoder(cls_BD, patches_BKD, keep_BK)

    def _pixels(self, decoded: Tensor, removed: Tensor, pixels_BNC: Tensor) -> Tensor:
        """The squared error of a view's removed patches, each patch's pixels whitened by themselves."""
        pixels: Any = self.pixels
        target = pixels_BNC.take_along_dim(removed[..., None], 1)
        variance = target.var(dim=-1, keepdim=True)  # unbiased
        target = (target - target.mean(dim=-1, keepdim=True)) / (variance + PIXEL_EPS).sqrt()
        return F.mse_loss(pixels(decoded).float(), target)

    def _patches(self, decoded: list[tuple[Tensor, Tensor]], targets: tuple[Tensor, ...], progress: float) -> Tensor:
        """Each view's removed places against what the teacher saw there in the same view."""
        options, (inside, prototypes) = self.options, targets
        warm = progress >= start_of(options) + options.warmup
        temperature = options.patch_temperature if warm else options.teacher_temperature
        losses = []
        for view, (tokens, removed) in enumerate(decoded):
            seen = inside[:, view, 1:].take_along_dim(removed[..., None], 1)
            taught = self._taught(seen, prototypes, self.patch_centre, temperature)
            losses.append(self._cross_entropy(tokens, taught))
        return torch.stack(losses).mean()

    def _classes(self, cls_VBD: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        """Each view's class token against the teacher's of every other view."""
        inside, prototypes = targets
        losses = []
        for view, other in permutations(range(len(cls_VBD)), 2):
            taught = self._taught(inside[:, other, 0], prototypes, self.centre, self.options.teacher_temperature)
            losses.append(self._cross_entropy(cls_VBD[view], taught))
        return torch.stack(losses).mean()

    def _taught(self, inside: Tensor, prototypes: Tensor, centre: Any, temperature: float) -> Tensor:
        """The teacher's distribution over prototypes, fp32."""
        logits = F.linear(inside, prototypes[0]).float()
        return ((logits - centre.float()) / temperature).softmax(dim=-1)

    def _cross_entropy(self, tokens: Tensor, taught: Tensor) -> Tensor:
        """The mean over tokens of the cross-entropy of the student's distribution over prototypes."""
        head: Any = self.head
        logits = head.prototypes(head(tokens)).float()
        return -(taught * (logits / self.options.student_temperature).log_softmax(dim=-1)).sum(-1).mean()


class PrototypeHead(nn.Module):
    """iBOT's head: three layers to a bottleneck of unit length, which meets prototypes of unit length."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        widths = [width, hidden, hidden, bottleneck]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = Prototypes(bottleneck, prototypes)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> rows of unit length [..., d]."""
        return F.normalize(self.mlp(tokens).float(), dim=-1).to(tokens.dtype)


class Prototypes(nn.Module):
    """P rows whose length does not count (weight norm with its gain at 1)."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(number, width))

    def forward(self, inside: Tensor | None = None) -> Tensor:
        """Logits [..., P] of rows [..., d]; of nothing the prototypes themselves, [P, d]."""
        rows = F.normalize(self.weight.float(), dim=-1).to(self.weight.dtype)
        return rows if inside is None else F.linear(inside, rows)
