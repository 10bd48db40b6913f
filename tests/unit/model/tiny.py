"""Small models for the tests of this room."""

from amclip_ds.loss import LossConfig
from amclip_ds.model.amclip import AClip, ModelConfig
from amclip_ds.model.heads import HeadsConfig
from amclip_ds.model.init import initialise
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.model.text import TextConfig
from amclip_ds.model.vision import VisionConfig

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
    model, loss = model or model_config(), loss or LossConfig()
    built = AClip(model, HeadsConfig(norm=norm, hidden_dim=24, output_dim=12), loss)
    initialise(built, seed, model, loss.kind)
    return built


def teacher(model: ModelConfig | None = None, loss: LossConfig | None = None, seed: int = 0) -> TeacherModel:
    model = model or model_config()
    built = TeacherModel(model, HeadsConfig(hidden_dim=24, output_dim=12), loss or LossConfig())
    initialise(built, seed, model)
    return built
