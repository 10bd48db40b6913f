"""A run's folder: made and described before the first step, given its weights after the last."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from amclip_ds import config as settings
from amclip_ds.config import TrainConfig
from amclip_ds.errors import UserError
from amclip_ds.record import write_atomically

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "transformers", "webdataset", "accelerate", "omegaconf",
            "open_clip_torch", "safetensors", "numpy")  # fmt: skip


def open_folder(config: TrainConfig) -> Path:
    """Makes the run's folder and writes config.yaml and versions.json into it. Raises UserError. Rank 0 only."""
    folder = Path(config.run.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", settings.dump(config))
        write_atomically(folder / "versions.json", describe_versions())
    except OSError as error:
        raise UserError(f"run.out: {folder} cannot be written: {error.strerror}") from None
    return folder


def describe_versions() -> str:
    """Packages, Python, machine, command and git revision, as JSON."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = {
        "amclip_ds": importlib.metadata.version("amclip_ds"), "python": platform.python_version(),
        "platform": platform.platform(), "cuda": torch.version.cuda, "git": git_revision(), "command": sys.argv,
    }  # fmt: skip
    return json.dumps(facts | versions, indent=1) + "\n"


def git_revision() -> str | None:
    """The revision this package was run from, with `+changes` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = _git("rev-parse", "HEAD", cwd=here)
        return revision + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", cwd=here) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str, cwd: Path) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def write_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes named fp32 weights as one safetensors file, old or new whatever happens. Rank 0 only."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)
