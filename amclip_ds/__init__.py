"""amclip_ds: pre-trains CLIP with masked image tokens (A-CLIP first) through DeepSpeed, from a laptop to a cluster.

    model = amclip_ds.load("runs/aclip-vitb16")        a Model: encode_image, encode_text, zero_shot, attention
    config = amclip_ds.load_config("aclip-tiny", ["data.train=/data/cc12m"])      a TrainConfig
    amclip_ds.train(config)

Importing it imports nothing: each name brings its module when it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from amclip_ds.config import TrainConfig as TrainConfig
    from amclip_ds.config import load as load_config
    from amclip_ds.errors import AmclipError as AmclipError
    from amclip_ds.errors import UserError as UserError
    from amclip_ds.library import Model as Model
    from amclip_ds.library import load as load

    def train(config: TrainConfig, resume: str = "auto") -> Path: ...


__all__ = ["AmclipError", "Model", "TrainConfig", "UserError", "load", "load_config", "train"]
_HOMES = {  # name -> (module, its name there)
    "AmclipError": ("errors", "AmclipError"),
    "Model": ("library", "Model"),
    "TrainConfig": ("config", "TrainConfig"),
    "UserError": ("errors", "UserError"),
    "load": ("library", "load"),
    "load_config": ("config", "load"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "train":
        return import_module("amclip_ds.train")  # a module that can be called: `train(config)`
    if name not in _HOMES:
        raise AttributeError(f"module 'amclip_ds' has no attribute {name!r}")
    module, inner = _HOMES[name]
    return getattr(import_module(f"amclip_ds.{module}"), inner)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
