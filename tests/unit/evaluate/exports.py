"""Exports of a tiny random model, as the writers make them; their proof is tests/unit/export's matter."""

import json
from pathlib import Path

import torch

from amclip_ds import config as settings
from amclip_ds.export.command import WRITERS
from amclip_ds.model.amclip import AClip
from amclip_ds.model.init import Start, initialise
from amclip_ds.run_folder import write_weights

FORMATS = ("open_clip", "hf", "timm", "onnx")


def tiny_model(recipe: str = "aclip-tiny", seed: int = 3) -> tuple[AClip, settings.TrainConfig]:
    """A randomly initialised model of a recipe, and the settings."""
    config = settings.load(recipe)
    module = AClip(config.model)
    initialise(module, Start(seed, config.model))
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a wrong place
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 and name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return module.requires_grad_(False).eval(), config


def write_export(fmt: str, folder: Path) -> None:
    """One format of the tiny model."""
    folder.mkdir(parents=True)
    module, config = tiny_model()
    WRITERS[fmt](folder, module, config.model)
    (folder / "amclip.json").write_text(json.dumps({"step": 7, "weights": "student", "format": fmt}))


def write_run(folder: Path) -> None:
    """A run's folder as training leaves it, with weights that no training made."""
    folder.mkdir(parents=True)
    for name, seed in (("student", 3), ("teacher", 4)):
        module, config = tiny_model(seed=seed)
        tensors = {
            key: tensor for key, tensor in module.state_dict().items() if name == "student" or key != "logit_scale"
        }
        write_weights(folder / f"{name}.safetensors", tensors, {"format": "pt", "weights": name, "step": "7"})
    (folder / "config.yaml").write_text(settings.dump(config))
