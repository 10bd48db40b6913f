"""PGS: as cluster, but the similarity moves from pixels to patch embeddings over the run, and anchors keep away from
edges (CLIP-PGS, CVPR 2025, as the paper means it; docs/methods.md says what its release does instead).

Shapes: B rows, U units, A anchors, G units along a side.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amclip_ds.masks.cluster import anchors, by_rule, check_anchors, similarity_with, unit_length
from amclip_ds.masks.salience import from_0_to_1
from amclip_ds.masks.units import joined, pool

if TYPE_CHECKING:
    from torch import Tensor

    from amclip_ds.masks import MaskInputs

ITERATIONS = 50  # of the released balancing, at most


@dataclass
class Options:
    anchor_ratio: float = 0.05
    """Part of the units that are drawn as anchors."""
    rule: str = "topk"
    """topk: those least like their nearest anchor stay | fill: those under the threshold stay, then others by a second
    draw (the release)."""
    threshold: float = 0.5
    """fill: a unit is hidden where its similarity with an anchor is above this."""
    embeddings: float = 1.0
    """Weight of the patch embeddings' similarity at the end of the run, from 0 at its start; the rest is pixels'."""
    edges: str = "pixels"
    """none | pixels: Sobel on grey pixels, the mean of each patch | means: Sobel on the grid of patch means."""
    anchors_at: str = "low"
    """low: anchors are drawn rather where edges are weak, which keeps objects (our reading) | high: where strong."""
    balance: str = "none"
    """none | release: the published "optimal transport" added to the similarity, which balances nothing and forms
    [U, U]."""

    def __post_init__(self) -> None:
        check_anchors("pgs", self.anchor_ratio, self.rule, self.threshold)
        if not 0 <= self.embeddings <= 1:
            raise ValueError(f"mask.pgs.embeddings: {self.embeddings} is outside [0, 1]")
        for key, allowed in (
            ("edges", ("none", "pixels", "means")),
            ("anchors_at", ("low", "high")),
            ("balance", ("none", "release")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"mask.pgs.{key}: {getattr(self, key)!r} is none of {', '.join(allowed)}")


def priority(inputs: "MaskInputs", options: Any) -> "Tensor":
    assert inputs.pixels is not None and inputs.patches is not None and inputs.progress is not None
    assert inputs.noise is not None and inputs.noise2 is not None
    draw = inputs.noise
    if options.edges != "none":
        found = pool(edges(inputs.pixels, inputs.grid, options.edges), inputs.grid, inputs.unit)
        draw = draw - found if options.anchors_at == "low" else draw + found
    chosen = anchors(draw, options.anchor_ratio)
    pixels, patches = (joined(values, inputs.grid, inputs.unit) for values in (inputs.pixels, inputs.patches))
    share = options.embeddings * inputs.progress
    similarity = mixed(unit_length(pixels), of_unit_length(patches), chosen, share, options.balance)
    return by_rule(options, similarity, inputs.noise2)


def mixed(pixels_BUD: "Tensor", patches_BUE: "Tensor", anchors_BA: "Tensor", share: "Tensor", balance: str) -> "Tensor":
    """[B, A, U]: share of the patch embeddings' cosine, the rest of the pixels'. Both are of unit length."""
    if balance == "none":
        by_pixels, by_patches = similarity_with(pixels_BUD, anchors_BA), similarity_with(patches_BUE, anchors_BA)
        return share * by_patches + (1 - share) * by_pixels
    whole = share * (patches_BUE @ patches_BUE.mT) + (1 - share) * (pixels_BUD @ pixels_BUD.mT)
    return (whole + released_balance(whole)).take_along_dim(anchors_BA[..., None], dim=1)


def of_unit_length(vectors_BUD: "Tensor") -> "Tensor":
    import torch.nn.functional as F

    return F.normalize(vectors_BUD.float(), dim=-1)


def edges(pixels_BND: "Tensor", grid: int, kind: str) -> "Tensor":
    """[B, N] in [0, 1]: how strong the edges are in each patch. pixels: MaskInputs.pixels; kind: pixels or means."""
    if kind == "means":
        return edges_of_means(pixels_BND.mean(-1), grid)
    patch = round((pixels_BND.shape[-1] / 3) ** 0.5)
    grey = pixels_BND.reshape(-1, grid, grid, patch, patch, 3).mean(-1)
    return edges_of_image(grey.transpose(2, 3).reshape(-1, grid * patch, grid * patch), grid)


def edges_of_means(means_BN: "Tensor", grid: int) -> "Tensor":
    """[B, N]: the release's Sobel on the grid of patch means, zeros around it; it takes the means of standardised
    patches, which are rounding noise, these are of the patches as they are."""
    import torch.nn.functional as F

    means = means_BN.reshape(-1, 1, grid, grid)
    return from_0_to_1(_sobel(F.pad(means, (1, 1, 1, 1))).flatten(1), 1e-6)


def edges_of_image(grey_BHW: "Tensor", grid: int) -> "Tensor":
    """Sobel on pixels, the image's border repeated; the mean of each patch, [B, N]."""
    import torch.nn.functional as F

    found = _sobel(F.pad(grey_BHW[:, None], (1, 1, 1, 1), mode="replicate"))
    return from_0_to_1(F.avg_pool2d(found, grey_BHW.shape[-1] // grid).flatten(1), 1e-6)


def _sobel(padded: "Tensor") -> "Tensor":
    """[B, 1, H + 2, W + 2] -> the size of the gradient, [B, 1, H, W]; by sums in fp32, without TF32."""
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    across = rows[..., 2:] - rows[..., :-2]
    down = columns[..., 2:, :] - columns[..., :-2, :]
    return (across.square() + down.square()).sqrt()


def released_balance(similarity_BUU: "Tensor") -> "Tensor":
    """The published iteration: both sums are taken before either division, so that it swings and never balances.

    On matrices with negative sums it grows to 1e5 and its result is rounding.
    """
    import torch

    values = similarity_BUU
    for _ in range(ITERATIONS):
        rows, columns = values.sum(-1, keepdim=True), values.sum(-2, keepdim=True)
        is_done = ((rows - 1).abs() < 1e-3).all() & ((columns - 1).abs() < 1e-3).all()  # then it is for ever, unread
        values = torch.where(is_done, values, values / (rows + 1e-3) / (columns + 1e-3))
    return values
