"""A folder for timm's `local-dir:`: the vision tower alone, whose output is the tower's feature."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.model import other_libraries
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig


def write(folder: Path, module: AClip, model: ModelConfig) -> None:
    """Writes config.json and model.safetensors."""
    vision = model.vision
    overrides = {
        "patch_size": vision.patch_size,
        "embed_dim": vision.width,
        "depth": vision.depth,
        "num_heads": vision.heads,
        "mlp_ratio": vision.mlp_ratio,
    }
    args: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if vision.pool == "mean":  # of all tokens after the tower's own norm
        args |= {"pool_include_prefix": True, "fc_norm": False}
    pool = "avg" if vision.pool == "mean" else "token"
    config = {
        "architecture": vision.name,
        "num_classes": 0,
        "num_features": module.vision.width,
        "global_pool": pool,
        "model_args": args | {"img_size": vision.image_size, "global_pool": pool},
        "pretrained_cfg": {
            "input_size": [3, vision.image_size, vision.image_size],
            "fixed_input_size": True,
            "num_classes": 0,
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "unknown",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tower = {name: tensor for name, tensor in module.state_dict().items() if name.startswith("vision.")}
    save_file(other_libraries.export_state("timm", tower), folder / "model.safetensors", metadata={"format": "pt"})
