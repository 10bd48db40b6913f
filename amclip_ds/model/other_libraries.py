"""The names that other libraries give to our parameters: one table a format, read in both directions.

A rule pairs our tensor with theirs; where one side keeps query, key and value apart it names the three. Shapes that
differ by axes of length 1 are reshaped, a projection that is stored the other way round is transposed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Rule:
    """ours <-> theirs; `#` is the number of a block. One name a side, or three against one."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    is_transposed: bool = False


def _same(ours: str, theirs: str, is_transposed: bool = False) -> Rule:
    return Rule((ours,), (theirs,), is_transposed)


def _both(ours: str, theirs: str) -> list[Rule]:
    """A layer with weight and bias."""
    return [_same(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def _qkv(ours: str | list[str], theirs: str | list[str]) -> list[Rule]:
    """Weight and bias of attention's input; a side is `name{}` (fused) or three names. `{}` takes weight or bias."""

    def named(side: str | list[str], part: str) -> tuple[str, ...]:
        return tuple(name.replace("{}", part) for name in ([side] if isinstance(side, str) else side))

    return [Rule(named(ours, part), named(theirs, part)) for part in ("weight", "bias")]


OUR_BLOCK, OUR_LAYER = "vision.blocks.#", "text.encoder.layers.#"
OUR_TEXT_QKV = [f"{OUR_LAYER}.self_attn.{letter}_proj.{{}}" for letter in "qkv"]


def _timm_tower(prefix: str) -> list[Rule]:
    """Our vision tower is timm's, under timm's own names."""
    names = ["cls_token", "pos_embed", "blocks.#.ls1.gamma", "blocks.#.ls2.gamma"]
    layers = [
        "patch_embed.proj",
        "norm_pre",
        "norm",
        *(f"blocks.#.{name}" for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
    ]
    return [_same(f"vision.{name}", prefix + name) for name in names] + [
        rule for layer in layers for rule in _both(f"vision.{layer}", prefix + layer)
    ]


def _resblocks(prefix: str) -> list[Rule]:
    """open_clip's blocks as our text layers."""
    theirs = f"{prefix}transformer.resblocks.#"
    return [
        *_qkv(OUR_TEXT_QKV, f"{theirs}.attn.in_proj_{{}}"),
        *_both(f"{OUR_LAYER}.self_attn.out_proj", f"{theirs}.attn.out_proj"),
        *_both(f"{OUR_LAYER}.layer_norm1", f"{theirs}.ln_1"),
        *_both(f"{OUR_LAYER}.layer_norm2", f"{theirs}.ln_2"),
        *_both(f"{OUR_LAYER}.mlp.fc1", f"{theirs}.mlp.c_fc"),
        *_both(f"{OUR_LAYER}.mlp.fc2", f"{theirs}.mlp.c_proj"),
    ]


def _open_clip_text(prefix: str) -> list[Rule]:
    return [
        _same("text.embeddings.token_embedding.weight", f"{prefix}token_embedding.weight"),
        _same("text.embeddings.position_embedding.weight", f"{prefix}positional_embedding"),
        *_resblocks(prefix),
        *_both("text.final_layer_norm", f"{prefix}ln_final"),
        _same("text_projection.weight", f"{prefix}text_projection", True),
        _same("logit_scale", "logit_scale"),
    ]


def _open_clip_native() -> list[Rule]:
    theirs = "visual.transformer.resblocks.#"
    return [
        _same("vision.cls_token", "visual.class_embedding"),
        _same("vision.pos_embed", "visual.positional_embedding"),
        _same("vision.patch_embed.proj.weight", "visual.conv1.weight"),
        *_both("vision.norm_pre", "visual.ln_pre"),
        *_both("vision.norm", "visual.ln_post"),
        *_both(f"{OUR_BLOCK}.norm1", f"{theirs}.ln_1"),
        *_both(f"{OUR_BLOCK}.norm2", f"{theirs}.ln_2"),
        *_qkv(f"{OUR_BLOCK}.attn.qkv.{{}}", f"{theirs}.attn.in_proj_{{}}"),
        *_both(f"{OUR_BLOCK}.attn.proj", f"{theirs}.attn.out_proj"),
        *_both(f"{OUR_BLOCK}.mlp.fc1", f"{theirs}.mlp.c_fc"),
        *_both(f"{OUR_BLOCK}.mlp.fc2", f"{theirs}.mlp.c_proj"),
        _same("image_projection.weight", "visual.proj", True),
    ]


def _hf_text(prefix: str) -> list[Rule]:
    """Our text tower is transformers', under its own names."""
    layers = [
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    ]
    return [
        _same("text.embeddings.token_embedding.weight", f"{prefix}embeddings.token_embedding.weight"),
        _same("text.embeddings.position_embedding.weight", f"{prefix}embeddings.position_embedding.weight"),
        *(rule for layer in layers for rule in _both(f"{OUR_LAYER}.{layer}", f"{prefix}encoder.layers.#.{layer}")),
        *_both("text.final_layer_norm", f"{prefix}final_layer_norm"),
        _same("image_projection.weight", "visual_projection.weight"),
        _same("text_projection.weight", "text_projection.weight"),
        _same("logit_scale", "logit_scale"),
    ]


def _hf_clip_tower() -> list[Rule]:
    theirs = "vision_model.encoder.layers.#"
    apart = [f"{theirs}.self_attn.{letter}_proj.{{}}" for letter in "qkv"]
    return [
        _same("vision.cls_token", "vision_model.embeddings.class_embedding"),
        _same("vision.pos_embed", "vision_model.embeddings.position_embedding.weight"),
        _same("vision.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
        *_both("vision.norm_pre", "vision_model.pre_layrnorm"),
        *_both("vision.norm", "vision_model.post_layernorm"),
        *_both(f"{OUR_BLOCK}.norm1", f"{theirs}.layer_norm1"),
        *_both(f"{OUR_BLOCK}.norm2", f"{theirs}.layer_norm2"),
        *_qkv(f"{OUR_BLOCK}.attn.qkv.{{}}", apart),
        *_both(f"{OUR_BLOCK}.attn.proj", f"{theirs}.self_attn.out_proj"),
        *_both(f"{OUR_BLOCK}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *_both(f"{OUR_BLOCK}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]


def _hf_vit_tower() -> list[Rule]:
    """transformers' ViTModel as VisionTextDualEncoderModel keeps it in a file."""
    theirs = "vision_model.encoder.layer.#"
    apart = [f"{theirs}.attention.attention.{name}.{{}}" for name in ("query", "key", "value")]
    return [
        _same("vision.cls_token", "vision_model.embeddings.cls_token"),
        _same("vision.pos_embed", "vision_model.embeddings.position_embeddings"),
        *_both("vision.patch_embed.proj", "vision_model.embeddings.patch_embeddings.projection"),
        *_both("vision.norm", "vision_model.layernorm"),
        *_both(f"{OUR_BLOCK}.norm1", f"{theirs}.layernorm_before"),
        *_both(f"{OUR_BLOCK}.norm2", f"{theirs}.layernorm_after"),
        *_qkv(f"{OUR_BLOCK}.attn.qkv.{{}}", apart),
        *_both(f"{OUR_BLOCK}.attn.proj", f"{theirs}.attention.output.dense"),
        *_both(f"{OUR_BLOCK}.mlp.fc1", f"{theirs}.intermediate.dense"),
        *_both(f"{OUR_BLOCK}.mlp.fc2", f"{theirs}.output.dense"),
    ]


def _published() -> list[Rule]:
    """The paper's published code."""
    return [*_timm_tower("visual."), *_open_clip_text(""), _same("image_projection.weight", "image_projection", True)]


FORMATS: dict[str, list[Rule]] = {
    "open_clip timm": [
        *_timm_tower("visual.trunk."),
        *_open_clip_text("text."),
        _same("image_projection.weight", "visual.head.proj.weight"),
    ],
    "open_clip timm, flat text": [
        *_timm_tower("visual.trunk."),
        *_open_clip_text(""),
        _same("image_projection.weight", "visual.head.proj.weight"),
    ],
    "open_clip": [*_open_clip_native(), *_open_clip_text("")],
    "open_clip, text apart": [*_open_clip_native(), *_open_clip_text("text.")],
    "transformers CLIPModel": [*_hf_clip_tower(), *_hf_text("text_model.")],
    "transformers VisionTextDualEncoderModel": [*_hf_vit_tower(), *_hf_text("text_model.")],
    "transformers VisionTextDualEncoderModel, nested": [*_hf_vit_tower(), *_hf_text("text_model.text_model.")],
    "published A-CLIP": _published(),
    "timm": _timm_tower(""),
}
WITHOUT_LEADING_AXES = {
    "visual.class_embedding",
    "visual.positional_embedding",
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.position_embedding.weight",
    "logit_scale",
}
SIGNATURE_KEYS = ("vision.cls_token", "text.embeddings.token_embedding.weight")  # what a format is recognised by


def recognise(keys: Iterable[str]) -> str | None:
    """The format whose names these keys are; None for none of them."""
    present = set(keys)
    for name, rules in FORMATS.items():
        signature = [rule.theirs[0] for rule in rules if rule.ours[0] in SIGNATURE_KEYS]
        if all(key in present for key in signature):
            return name
    return None


def match_keys(fmt: str, keys: Iterable[str]) -> dict[str, Rule]:
    """Our names that a file of this format holds -> the rule with the block's number filled in."""
    present = set(keys)
    found: dict[str, Rule] = {}
    for rule in _filled(FORMATS[fmt], present):
        if all(key in present for key in rule.theirs):
            found |= dict.fromkeys(rule.ours, rule)
    return found


def _filled(rules: Iterable[Rule], names: Iterable[str]) -> Iterator[Rule]:
    """The rules, those of blocks once for each block number that occurs in the names."""
    numbers = sorted({int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)})
    for rule in rules:
        for number in numbers if "#" in rule.theirs[0] else [0]:
            ours, theirs = (tuple(name.replace("#", str(number)) for name in side) for side in (rule.ours, rule.theirs))
            yield Rule(ours, theirs, rule.is_transposed)


def import_tensor(rule: Rule, name: str, read: Read) -> Tensor:
    """Our tensor of that name, out of theirs."""
    theirs = [read(key) for key in rule.theirs]
    if len(rule.ours) == 3:
        return theirs[0].chunk(3)[rule.ours.index(name)]
    return torch.cat(theirs) if len(theirs) == 3 else theirs[0].T if rule.is_transposed else theirs[0]


def export_state(fmt: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names and in their shapes. Raises KeyError for one of ours without a place in theirs."""
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for rule in _filled(FORMATS[fmt], state):
        if not all(name in state for name in rule.ours):
            continue
        used.update(rule.ours)
        tensors = [state[name] for name in rule.ours]
        if len(rule.theirs) == 3:
            parts = list(tensors[0].chunk(3))
        else:
            parts = [torch.cat(tensors) if len(tensors) == 3 else tensors[0].T if rule.is_transposed else tensors[0]]
        for key, part in zip(rule.theirs, parts):
            result[key] = (part.squeeze() if key in WITHOUT_LEADING_AXES else part).clone().contiguous()
    unused = sorted(set(state) - used)
    if unused:
        raise KeyError(f"{fmt} has no place for {', '.join(unused)}")
    return result
