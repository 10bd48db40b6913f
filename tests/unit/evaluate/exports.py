"""Exports of a tiny random model, as the writers make them; their proof is tests/unit/export's matter."""

import json
from pathlib import Path

import torch

from amclip_ds import config as settings
from amclip_ds.checkpoint import CheckpointConfig
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import Saver
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.engine.shards import Shard
from amclip_ds.export.command import WRITERS
from amclip_ds.model.amclip import AClip
from amclip_ds.model.init import Start, initialise
from amclip_ds.run_folder import write_weights
from tests.distributed.cases_checkpoint_files import toy_counters

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


def write_checkpoint(run: Path, with_teacher: bool = True) -> Path:
    """A checkpoint below a run of the tiny model, as the saver writes it, of step 7 and without an optimizer."""
    config = tiny_model()[1]
    sharded: dict[str, dict[str, Shard]] = {}
    for kind, seed in (("master", 3), ("ema", 4))[: 1 + with_teacher]:
        state = tiny_model(seed=seed)[0].state_dict()
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        whole = {name: tensor.flatten() for name, tensor in state.items() if kind == "master" or name != "logit_scale"}
        sharded[kind] = {name: Shard(flat, 0, len(flat), len(flat)) for name, flat in whole.items()}
    state = CheckpointState(sharded, shapes, small=toy_counters(7), config=settings.dump(config))
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    no_more = CheckpointConfig(every_steps=None, every_minutes=None)
    with Saver(folder, no_more, Ranks(), say=print, incident=print) as saver:
        saver.save(7, state, wait=True)
    (run / "config.yaml").write_text(settings.dump(config))
    return folder / "step_00000007"


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
