"""The parameters of a model by name and shape, in the order in which AClip and TeacherModel hold them, without torch.

Tests hold them against the modules themselves. Shapes: D vision width, W text width, E embedding.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from amclip_ds.model.config import HeadsConfig, ModelConfig, TextConfig, VisionConfig, patch_grid


@dataclass(frozen=True)
class Parameter:
    """What is known of a tensor that does not exist; it has as much of a torch parameter as optim.py reads."""

    shape: tuple[int, ...]
    requires_grad: bool = True

    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)


Parameters = dict[str, Parameter]


class Tower(NamedTuple):
    """The shape of a vision tower."""

    width: int
    depth: int
    heads: int
    hidden: int
    """width of the MLP"""
    patch: int
    """side of a patch in pixels"""
    is_clip: bool
    """timm's CLIP variants: a norm before the blocks, patches without bias"""
    cls_has_position: bool = True
    """not so in FlexiViT"""


# timm's plain ViTs with a class token: width, depth, heads, hidden width of the MLP, and which there are.
NAMED: dict[str, tuple[int, int, int, int, str]] = {
    "tiny": (192, 12, 3, 768, "16_224 16_384"),
    "xsmall": (256, 10, 4, 1024, "16_clip_224"),
    "small": (384, 12, 6, 1536, "8_224 16_224 16_384 32_224 32_384"),
    "medium": (512, 12, 8, 2048, "16_clip_224 32_clip_224"),
    "betwixt": (640, 12, 10, 2560, "32_clip_224"),
    "base": (
        768,
        12,
        12,
        3072,
        "8_224 16_224 16_384 16_clip_224 16_clip_384 16_clip_quickgelu_224 32_224 32_384 32_clip_224 32_clip_256"
        " 32_clip_384 32_clip_448 32_clip_quickgelu_224",
    ),
    "large": (
        1024,
        24,
        16,
        4096,
        "14_224 14_clip_224 14_clip_336 14_clip_quickgelu_224 14_clip_quickgelu_336 16_224 16_384 32_224 32_384",
    ),
    "huge": (
        1280,
        32,
        16,
        5120,
        "14_224 14_clip_224 14_clip_336 14_clip_378 14_clip_quickgelu_224 14_clip_quickgelu_378",
    ),
    "giant": (1408, 40, 16, 6144, "14_224 14_clip_224"),
    "gigantic": (1664, 48, 16, 8192, "14_224 14_clip_224 14_clip_378 14_clip_quickgelu_224"),
}


def tower_of(config: VisionConfig) -> Tower:
    """The tower's shape: from the name where it is a plain one, else as timm builds it (which loads torch).

    Raises ValueError, in one line, for what the tower cannot hold.
    """
    named = _named(config.name)
    if named is None:
        return _built(config)
    width = config.width or named.width
    hidden = int(width * config.mlp_ratio) if config.mlp_ratio else round(width * named.hidden / named.width)
    heads = config.heads or named.heads
    if width % heads:
        raise ValueError(f"model.vision.heads: {heads} does not divide the width {width}")
    return Tower(width, config.depth or named.depth, heads, hidden, config.patch_size or named.patch, named.is_clip)


def _named(name: str) -> Tower | None:
    found = re.fullmatch(r"vit_([a-z]+)_patch(\d+_.*)", name)
    if not found or found[1] not in NAMED:
        return None
    width, depth, heads, hidden, variants = NAMED[found[1]]
    if found[2] not in variants.split():
        return None
    return Tower(width, depth, heads, hidden, int(found[2].split("_")[0]), "_clip_" in name)


def _built(config: VisionConfig) -> Tower:
    import torch

    from amclip_ds.model.vision import build_vit

    with torch.device("meta"):
        vit = build_vit(config)
    block = vit.blocks[0]
    tower = Tower(
        vit.embed_dim,
        len(vit.blocks),
        block.attn.num_heads,
        block.mlp.fc1.out_features,
        vit.patch_embed.patch_size[0],
        not isinstance(vit.norm_pre, torch.nn.Identity),
        not vit.no_embed_class,
    )
    ours = {name: p.shape for name, p in vision_parameters(config, tower).items()}
    theirs = {name: tuple(p.shape) for name, p in vit.named_parameters()}
    if ours != theirs:
        odd = sorted(ours.keys() ^ theirs.keys() or {name for name in ours if ours[name] != theirs[name]})
        raise ValueError(f"model.vision.name: {config.name!r} is not a plain ViT ({odd[0]}); it cannot be planned")
    return tower


def vision_parameters(config: VisionConfig, tower: Tower) -> Parameters:
    """Of the vision tower, by their names in it."""
    D, is_trained = tower.width, not config.freeze_patch_embed
    found = {
        "cls_token": Parameter((1, 1, D)),
        "pos_embed": Parameter((1, patch_grid(config) ** 2 + int(tower.cls_has_position), D)),
        "patch_embed.proj.weight": Parameter((D, 3, tower.patch, tower.patch), is_trained),
    }
    if tower.is_clip:
        found |= _norm("norm_pre", D)
    else:
        found["patch_embed.proj.bias"] = Parameter((D,), is_trained)
    for block in range(tower.depth):
        parts = {
            **_norm("norm1", D),
            **_linear("attn.qkv", D, 3 * D),
            **_linear("attn.proj", D, D),
            **_norm("norm2", D),
            **_linear("mlp.fc1", D, tower.hidden),
            **_linear("mlp.fc2", tower.hidden, D),
        }
        found |= _within(f"blocks.{block}", parts)
    return found | _norm("norm", D)


def text_parameters(config: TextConfig) -> Parameters:
    """Of the text tower, by their names in it."""
    W, hidden = config.width, int(config.width * config.mlp_ratio)
    found = {
        "embeddings.token_embedding.weight": Parameter((config.vocab_size, W)),
        "embeddings.position_embedding.weight": Parameter((config.context_length, W)),
    }
    for layer in range(config.depth):
        parts: Parameters = {}
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            parts |= _linear(f"self_attn.{name}", W, W)
        parts |= _norm("layer_norm1", W) | _linear("mlp.fc1", W, hidden) | _linear("mlp.fc2", hidden, W)
        found |= _within(f"encoder.layers.{layer}", parts | _norm("layer_norm2", W))
    return found | _norm("final_layer_norm", W)


def head_parameters(widths: list[int], has_bias: bool) -> Parameters:
    """Of model.heads.MLPHead, whose norms have the same parameters whichever they are."""
    found: Parameters = {}
    for place, (before, after) in enumerate(zip(widths, widths[1:])):
        found |= _linear(f"layers.{3 * place}", before, after, has_bias)
        if place < len(widths) - 2:
            found |= _norm(f"layers.{3 * place + 1}", after)
    return found


def simclr_head(width: int, heads: HeadsConfig) -> list[int]:
    """The widths of simclr's head."""
    return [width, heads.hidden_dim, heads.hidden_dim, heads.output_dim]


def byol_heads(width: int, heads: HeadsConfig) -> dict[str, list[int]]:
    """The widths of byol's heads."""
    return {
        "projector": [width, heads.hidden_dim, heads.output_dim],
        "predictor": [heads.output_dim, heads.hidden_dim, heads.output_dim],
    }


def model_parameters(
    model: ModelConfig, tower: Tower, objectives: Mapping[str, Parameters], has_logit_bias: bool
) -> Parameters:
    """Of AClip, in its order. objectives: by name, the parameters of each."""
    found = {"logit_scale": Parameter((1,))}
    if has_logit_bias:
        found["logit_bias"] = Parameter((1,))
    found |= _towers(model, tower)
    for name, parameters in objectives.items():
        found |= _within(f"objectives.{name}", parameters)
    return found


def teacher_parameters(
    model: ModelConfig, tower: Tower, objectives: Mapping[str, Parameters], averaged: Mapping[str, tuple[str, ...]]
) -> Parameters:
    """Of TeacherModel. averaged: by objective, the parts of which it keeps an average."""
    found = _towers(model, tower)
    for name, parameters in objectives.items():
        kept = {key: value for key, value in parameters.items() if key.split(".")[0] in averaged.get(name, ())}
        found |= _within(f"objectives.{name}", kept)
    return found


def _towers(model: ModelConfig, tower: Tower) -> Parameters:
    return {
        **_within("vision", vision_parameters(model.vision, tower)),
        **_within("text", text_parameters(model.text)),
        **_linear("image_projection", tower.width, model.embed_dim, False),
        **_linear("text_projection", model.text.width, model.embed_dim, False),
    }


def _within(prefix: str, parameters: Parameters) -> Parameters:
    return {f"{prefix}.{name}": parameter for name, parameter in parameters.items()}


def _norm(name: str, width: int) -> Parameters:
    return {f"{name}.weight": Parameter((width,)), f"{name}.bias": Parameter((width,))}


def _linear(name: str, before: int, after: int, has_bias: bool = True) -> Parameters:
    return {f"{name}.weight": Parameter((after, before))} | ({f"{name}.bias": Parameter((after,))} if has_bias else {})


def count(parameters: Parameters) -> Iterator[int]:
    """Elements of each."""
    return (parameter.numel() for parameter in parameters.values())
