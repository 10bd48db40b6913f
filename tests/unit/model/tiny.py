"""Small models for the tests of this room."""

import torch
from torch import Tensor

from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import HeadsConfig, LossConfig, ModelConfig, TextConfig, VisionConfig
from amclip_ds.model.features import StudentInputs, Targets, ViewGroup
from amclip_ds.model.init import initialise
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder, chosen, start_of

EOS = 99


def vision_config(**changes: object) -> VisionConfig:
    settings = dict(name="vit_tiny_patch16_224", image_size=32, patch_size=8, width=32, depth=3, heads=4, mlp_ratio=2.0)
    return VisionConfig(**{**settings, **changes})  # type: ignore[arg-type]


def text_config(**changes: object) -> TextConfig:
    settings = dict(width=32, depth=2, heads=4, context_length=16, vocab_size=100, eos_token_id=EOS)
    return TextConfig(**{**settings, **changes})  # type: ignore[arg-type]


def model_config(**vision: object) -> ModelConfig:
    return ModelConfig(vision=vision_config(**vision), text=text_config(), embed_dim=16)


def student(
    model: ModelConfig | None = None, loss: LossConfig | None = None, seed: int = 0, norm: str = "batch"
) -> AClip:
    model = model or model_config()
    objectives = chosen(loss or LossConfig(), HeadsConfig(norm=norm, hidden_dim=24, output_dim=12))
    built = AClip(model, builder(objectives))
    initialise(built, start_of(seed, model, objectives))
    return built


def teacher(model: ModelConfig | None = None, loss: LossConfig | None = None, seed: int = 0) -> TeacherModel:
    model = model or model_config()
    objectives = chosen(loss or LossConfig(), HeadsConfig(hidden_dim=24, output_dim=12))
    built = TeacherModel(model, builder(objectives))
    initialise(built, start_of(seed, model, objectives))
    return built


def inputs(images: Tensor, token_ids: Tensor, keep_indices: Tensor | None = None, views: int = 2) -> StudentInputs:
    """images [V * B, 3, H, W] view-major, of one group; keep_indices [V * B, K] that stay."""
    group = ViewGroup(tuple(range(views)), images.unflatten(0, (views, -1)), (), keep_indices)
    return StudentInputs((group,), {"plain": token_ids})


def targets(batch: int) -> Targets:
    """What a teacher of this size gives."""
    return {"byol": (torch.randn(batch, 12, generator=torch.Generator().manual_seed(5)),)}
