"""A folder for open_clip's `local-dir:`: open_clip_config.json and open_clip_model.safetensors.

Two forms. `timm`: the tower is a timm model by name, at the size and with the heads that its name means, since
open_clip passes neither on. `native`: open_clip's own transformer, any size, one activation for both towers; it has no
bias in the patch embedding, which is folded into the positions of the patches.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.errors import UserError
from amclip_ds.model import other_libraries
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig

PREPROCESS = {"mean": list(MEAN), "std": list(STD), "interpolation": "bilinear", "resize_mode": "shortest"}


def write(folder: Path, module: AClip, model: ModelConfig) -> None:
    """Writes the folder's files. Raises UserError, with nothing written, for a model that open_clip cannot hold."""
    form = form_of(module, model)
    state = dict(module.state_dict())
    state.pop("logit_bias", None)
    if form == "native":
        state = fold_patch_bias(state)
    tensors = other_libraries.export_state("open_clip timm" if form == "timm" else "open_clip", state)
    config = {"model_cfg": model_config(form, module, model), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def form_of(module: AClip, model: ModelConfig) -> str:
    """timm | native. Raises UserError, in one line that says why, where neither holds the model."""
    refuse_mean("open_clip", model)
    if model.text.eos_token_id != model.text.vocab_size - 1:
        raise UserError(
            "--format open_clip: it pools texts at the largest token id, and model.text.eos_token_id is not it"
        )
    differs = _differs_from_its_name(module, model)
    if differs is None:
        return "timm"
    problem = None
    activation = activation_of(module)
    if activation != model.text.activation:
        problem = (
            f"its own tower has one activation for both, and this one has {activation} for images and"
            f" {model.text.activation} for texts"
        )
    elif any(
        isinstance(block.ls1, nn.Module) and not isinstance(block.ls1, nn.Identity) for block in blocks_of(module)
    ):
        problem = "its own tower has no such layer scale"
    elif not module.vision.cls_has_position:
        problem = "its own tower has a position for the class token"
    if problem:
        raise UserError(
            f"--format open_clip: {differs}, which its timm tower cannot say, and {problem}; --format hf can"
        )
    return "native"


def refuse_mean(fmt: str, model: ModelConfig) -> None:
    """Raises UserError for a tower whose feature is the mean of its tokens, which these libraries take otherwise."""
    if model.vision.pool == "mean":
        raise UserError(
            f"--format {fmt}: model.vision.pool=mean has the class token in the mean, which it cannot say;"
            " --format timm and onnx can"
        )


def _differs_from_its_name(module: AClip, model: ModelConfig) -> str | None:
    """What of the tower is not what the timm name alone means; None if nothing is."""
    import timm

    with torch.device("meta"):
        named: Any = timm.create_model(model.vision.name, num_classes=0)
    vision = cast(Any, module.vision)
    facts = {
        "model.vision.image_size": (model.vision.image_size, named.patch_embed.img_size[0]),
        "model.vision.patch_size": (vision.patch_size, named.patch_embed.patch_size[0]),
        "model.vision.width": (vision.width, named.embed_dim),
        "model.vision.depth": (len(vision.blocks), len(named.blocks)),
        "model.vision.heads": (vision.blocks[0].attn.num_heads, named.blocks[0].attn.num_heads),
        "model.vision.mlp_ratio": (vision.blocks[0].mlp.fc1.out_features, named.blocks[0].mlp.fc1.out_features),
    }
    different = [f"{key} is not that of {model.vision.name}" for key, (ours, its) in facts.items() if ours != its]
    return different[0] if different else None


def blocks_of(module: AClip) -> list[Any]:
    return list(cast(Any, module.vision).blocks)


def activation_of(module: AClip) -> str:
    """gelu | quick_gelu: of the vision tower."""
    name = type(blocks_of(module)[0].mlp.act).__name__.lower()
    return "quick_gelu" if "quick" in name else "gelu"


def fold_patch_bias(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tower without a bias in its patch embedding: what each patch gets is added to its position instead."""
    state = dict(state)
    bias = state.pop("vision.patch_embed.proj.bias", None)
    if bias is not None:
        positions = state["vision.pos_embed"].clone()
        positions[:, 1:] += bias
        state["vision.pos_embed"] = positions
    return state


def model_config(form: str, module: AClip, model: ModelConfig) -> dict[str, Any]:
    """open_clip's model_cfg."""
    vision, text = cast(Any, module.vision), model.text
    config: dict[str, Any] = {
        "embed_dim": model.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
            "mlp_ratio": text.mlp_ratio,
        },
    }
    if form == "timm":
        return config | {
            "custom_text": True,
            "vision_cfg": {
                "timm_model_name": model.vision.name,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": "linear",
                "image_size": model.vision.image_size,
            },
        }
    block = vision.blocks[0]
    has_norm_pre = not isinstance(vision.norm_pre, nn.Identity)
    return config | {
        "vision_cfg": {
            "layers": len(vision.blocks),
            "width": vision.width,
            "head_width": vision.width // block.attn.num_heads,
            "mlp_ratio": block.mlp.fc1.out_features / vision.width,
            "patch_size": vision.patch_size,
            "image_size": model.vision.image_size,
            "no_ln_pre": not has_norm_pre,
            "pool_type": "tok",
            "norm_kwargs": {"eps": vision.norm.eps},
        }
    }
