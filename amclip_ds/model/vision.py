"""The vision tower: a timm ViT that can drop tokens between patch embedding and blocks, and score its patches.

Shapes: B batch (all views of it), N patches, K kept, D width. timm is imported where it is used:
it costs seconds.
"""

import difflib
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amclip_ds.errors import in_one_line
from amclip_ds.masks.selection import Selection, choose, keep_tokens
from amclip_ds.model.config import VisionConfig, grid_of
from amclip_ds.model.patches import PatchProjection, rows_of
from amclip_ds.model.pooled import QueryOfFirst
from amclip_ds.model.savings import Savings


def build_vit(config: VisionConfig) -> Any:
    """The timm ViT of that name, uninitialised. Raises ValueError, in one line, for what the tower cannot hold."""
    import timm

    overrides: dict[str, Any] = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
    }
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models("*vit*"), n=1, cutoff=0.3)
        raise ValueError(f"model.vision.name: timm has no {config.name!r}" + (f"; nearest: {near[0]}" if near else ""))
    try:
        vit = timm.create_model(
            config.name,
            num_classes=0,
            img_size=config.image_size,
            dynamic_img_size=True,
            global_pool="token",
            weight_init="skip",
            **{key: value for key, value in overrides.items() if value is not None},
        )
    except TypeError as error:  # a class that does not know these arguments
        raise ValueError(f"model.vision.name: {config.name!r} is not timm's plain VisionTransformer") from error
    except (AssertionError, RuntimeError) as error:
        reason = in_one_line(error)
        raise ValueError(f"model.vision.name: {config.name!r} cannot be the tower: {reason}") from error
    if unsupported := _why_unsupported(vit):
        raise ValueError(f"model.vision.name: {config.name!r} cannot be the tower: {unsupported}")
    return vit


def _why_unsupported(vit: Any) -> str | None:
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if type(vit) is not VisionTransformer:
        return f"it is a {type(vit).__name__}, not timm's plain VisionTransformer"
    if vit.cls_token is None:
        return "it has no class token"
    if vit.num_prefix_tokens != 1:
        return "it has register tokens"
    if vit.pos_embed is None:
        return "it has no learned position embedding"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(vit.patch_embed).__name__}"
    if not all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks):
        return "its blocks are not timm's plain ones"
    attention = vit.blocks[0].attn
    if getattr(attention, "gate", None) is not None or not isinstance(
        getattr(attention, "norm", nn.Identity()), nn.Identity
    ):
        return "its attention is gated or normalised"
    return None


def built_patch_size(config: VisionConfig) -> int:
    with torch.device("meta"):
        return build_vit(config).patch_embed.patch_size[0]


class VisionOutput(NamedTuple):
    """What leaves the tower, as a tuple for ZeRO-3's hooks."""

    tokens: Tensor
    """[B, 1 + K, D] after the last norm, the class token first; or that alone, [B, 1, D]"""
    keep_indices: Tensor | None
    """[B, K] the patches that stayed; None: all"""
    scores: Tensor | None
    """[B, N] fp32, where asked for"""

    @property
    def cls(self) -> Tensor:
        """[B, D] the class token"""
        return self.tokens[:, 0]


class VisionTower(nn.Module):
    """A timm ViT's modules under their own names, with token removal and CLS-row scores in the forward."""

    compiled_parts = ("embed_kept", "through_blocks")

    def __init__(self, config: VisionConfig, savings: Savings | None = None) -> None:
        from amclip_ds.model.vision_block import VisionBlock

        super().__init__()
        vit = build_vit(config)
        self.savings = savings or Savings()
        self.checkpoint_every = config.checkpoint_every
        self.pool = config.pool
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.grid: int = grid_of(config.image_size, self.patch_size)
        self.width: int = vit.embed_dim
        self.cls_has_position: bool = not vit.no_embed_class
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token
        self.pos_embed = vit.pos_embed
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm
        PatchProjection.become(self.patch_embed.proj)
        QueryOfFirst.become(self.blocks[-1].attn.qkv)
        for block in self.blocks:
            VisionBlock.become(block)
        if config.freeze_patch_embed:
            self.patch_embed.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        selections: tuple[Selection, ...] = (),
        keep_indices: Tensor | None = None,
        with_scores: bool = False,
        num_views: int = 1,
        cls_only: bool = False,
    ) -> VisionOutput:
        """images [B, 3, H, W] of any size the patch divides; rows are num_views x samples.

        selections choose the tokens that stay, unless keep_indices [B, K] says which; neither: all stay.
        with_scores: also how much CLS attends to each patch, the mean over all blocks and heads; the CLS column is
        dropped after the softmax and not renormalised. cls_only: of the tokens nothing but the feature is read.
        """
        x, keep_indices = self._embed(images, selections, keep_indices, num_views)
        tokens, scores = self.through_blocks(
            x, with_scores, cls_only and self.pool == "cls" and self.savings.last_block
        )
        return VisionOutput(tokens, keep_indices, scores)

    def feature(self, tokens: Tensor) -> Tensor:
        """The feature of an image: [..., 1 + K, D] after the last norm -> [..., D]."""
        return tokens.select(-2, 0) if self.pool == "cls" else tokens.mean(dim=-2)

    def _embed(
        self, images: Tensor, selections: tuple[Selection, ...], keep_indices: Tensor | None, num_views: int
    ) -> tuple[Tensor, Tensor | None]:
        """Patchify, add positions, choose and remove tokens, prepend CLS: [B, 1 + K, D], and what stays."""
        height, width = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        positions = self._positions(height, width)
        cls = self.cls_token + positions[:, :1] if self.cls_has_position else self.cls_token
        positions = positions[:, int(self.cls_has_position) :]
        if self.savings.patchify and isinstance(self.patch_embed.norm, nn.Identity):
            if keep_indices is None and selections and not any("patches" in chosen.needs for chosen in selections):
                keep_indices = choose(selections, num_views, None, images)
                selections = ()
            if keep_indices is not None or not selections:
                return self.norm_pre(self.embed_kept(images, keep_indices, cls, positions)), keep_indices
        x = self.patch_embed(images.to(self.cls_token.dtype)).flatten(1, 2) + positions
        if keep_indices is None and selections:
            keep_indices = choose(selections, num_views, x, images)
        x = keep_tokens(x, keep_indices)
        return self.norm_pre(torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)), keep_indices

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        from timm.layers import resample_abs_pos_embed

        return resample_abs_pos_embed(
            self.pos_embed, [height, width], [self.grid, self.grid], int(self.cls_has_position)
        )

    def embed_kept(self, images: Tensor, keep_indices: Tensor | None, cls: Tensor, positions: Tensor) -> Tensor:
        """Class token and kept patches, with their positions [1, N, D]: [B, 1 + K, D]. Other patches cost nothing."""
        if not self.savings.one_write:
            rows = rows_of(images, self.patch_size, keep_indices, self.cls_token.dtype)
            kept = positions if keep_indices is None else positions[0][keep_indices]
            x = self.patch_embed.proj(rows) + kept
            return torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)
        rows = rows_of(images, self.patch_size, keep_indices, self.cls_token.dtype, first_empty=True)
        places = None if keep_indices is None else F.pad(keep_indices + 1, (1, 0))
        return self.patch_embed.proj(rows, torch.cat([cls, positions], dim=1)[0], places)

    def through_blocks(self, x: Tensor, with_scores: bool, cls_only: bool) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> after the last norm, and the scores [B, T - 1] where asked for."""
        rows = torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device) if with_scores else None
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            run = partial(block, with_row=with_scores, cls_only=cls_only and index == last)
            if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)  # no dropout in any tower
            else:
                x = run(x)
            if rows is not None:
                x, row = x
                rows = rows + row
        num_heads = sum(block.attn.num_heads for block in self.blocks)
        return self.norm(x), rows[:, 1:] / num_heads if rows is not None else None
