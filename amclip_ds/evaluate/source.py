"""SOURCE of `amclip eval` and `amclip export`: a run's folder, a checkpoint of any stage and world size, or an export.

Run and checkpoint give our own module with whole fp32 weights; an export gives the model of its library.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from amclip_ds import config as settings
from amclip_ds import hub, run_files, safetensors_header
from amclip_ds.checkpoint import manifest, retention, step_folders
from amclip_ds.checkpoint.tensorfile import DamagedError
from amclip_ds.config import TrainConfig
from amclip_ds.errors import AmclipError, UserError, in_one_line
from amclip_ds.evaluate.encoder import Encoder, TowerEncoder
from amclip_ds.evaluate.export_folder import read_own
from amclip_ds.evaluate.source_kind import CHECKPOINT, RUN, kind_of
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.pretrained import Source, fit


@dataclass
class Located:
    """A source, before its weights are read."""

    path: Path
    """of the run, checkpoint or export"""
    kind: str
    """run | checkpoint | open_clip | hf | timm | onnx"""
    weights: tuple[str, ...]
    """student, teacher: what it holds"""
    step: int
    run: Path | None
    """the run it belongs to, where its numbers are appended"""
    config: TrainConfig | None

    def check_holds(self, weights: str) -> None:
        """Raises UserError for weights that it does not hold."""
        if weights not in self.weights:
            raise UserError(f"{self.path}: holds no {weights}; --weights {self.weights[0]}")


def locate(source: str | Path) -> Located:
    """What is at a path, or at `hf-hub:ORG/NAME`. A run without final weights is read as its newest valid checkpoint.

    Raises UserError.
    """
    path = hub.local(str(source))
    kind = kind_of(path)
    if kind == CHECKPOINT:
        return _checkpoint(path)
    if kind == RUN:
        return _run(path)
    if kind == "hf" and "architecture" in read_own(path / "config.json"):
        kind = "timm"
    card = path / "amclip.json"
    facts = read_own(card) if card.is_file() else {}
    weights, step = facts.get("weights", "student"), facts.get("step", 0)
    if weights not in ("student", "teacher") or type(step) is not int or step < 0:
        raise UserError(f"{card}: does not say whose weights these are, of which step")
    return Located(path, kind, (weights,), step, None, None)


def _run(path: Path) -> Located:
    held = tuple(name for name in ("student", "teacher") if (path / f"{name}.safetensors").is_file())
    if held:
        weights = path / f"{held[0]}.safetensors"
        step = safetensors_header.step_of(weights, safetensors_header.read(weights).metadata)
        return Located(path, "run", held, step, path, settings.load_run(path / run_files.CONFIG))
    for _, checkpoint in reversed(step_folders.list_steps(path / run_files.CHECKPOINTS)):
        if retention.is_whole(checkpoint):
            return _checkpoint(checkpoint)
    raise UserError(f"{path}: no weights yet: neither student.safetensors nor a whole checkpoint")


def _checkpoint(path: Path) -> Located:
    """Reads and checks the manifest, and every file but the optimizer's against its hash."""
    try:
        found = manifest.read(path)
        manifest.check_sizes(path, found)
        for name in found.files:
            if not name.startswith("optim/"):
                manifest.check_hash(path, found, name)
    except DamagedError as error:
        raise UserError(f"damaged checkpoint: {error}") from None
    run = path.resolve().parent.parent
    config = path / run_files.CONFIG if (path / run_files.CONFIG).is_file() else run / run_files.CONFIG
    if not config.is_file():
        raise UserError(f"{path}: no config.yaml in it or in its run")
    held = ("student", "teacher") if found.tensors.get("ema") else ("student",)
    owner = run if (run / run_files.CONFIG).is_file() and path.resolve().parent.name == run_files.CHECKPOINTS else None
    return Located(path, "checkpoint", held, found.step, owner, settings.load_run(config))


def build_towers(located: Located, weights: str, device: torch.device | None = None) -> AClip:
    """Both towers and projections with a run's or checkpoint's weights, fp32, in eval mode.

    The teacher has no logit scale of its own: the student's is given to it. Raises UserError for what does not fit.
    """
    assert located.config is not None
    located.check_holds(weights)
    source = Source(located.path, weights)
    other = Source(located.path, "student") if weights == "teacher" else source
    return fill_towers(located.config.model, [source, other], device)


def fill_towers(model: ModelConfig, sources: list[Source], device: torch.device | None = None) -> AClip:
    """An AClip without objectives whose parameters come from the first source that has each. Raises UserError."""
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device

    with init_empty_weights():  # parameters on `meta`: they are made once, from the file
        module = AClip(model)
    for name, parameter in list(module.named_parameters()):
        tensor = next((tensor for source in sources if (tensor := source.read(name)) is not None), None)
        if tensor is None and name == "vision.patch_embed.proj.bias":
            tensor = torch.zeros(parameter.shape)
        if tensor is None:
            raise UserError(f"{sources[0].path}: lacks {name}, which the model of its config has")
        value = fit(tensor, name, parameter.shape, str(sources[0].path))
        set_module_tensor_to_device(module, name, device or torch.device("cpu"), value=value)
    return module.requires_grad_(False).eval()


def open_encoder(
    located: Located, weights: str, device: torch.device, preprocess: str = "ours", keep_ratio: float = 1.0
) -> Encoder:
    """The encoder of a source. preprocess: ours | library, whose pixels an export sees. keep_ratio: share of an image's
    patches that a run's or checkpoint's model encodes (token_removal)."""
    if located.config is None:
        from amclip_ds.evaluate.libraries import open_library

        located.check_holds(weights)
        try:
            return open_library(located.path, located.kind, weights, device, preprocess)
        except AmclipError:
            raise
        except Exception as error:  # whatever a library raises over a torn folder
            reason = in_one_line(error, 300)
            raise UserError(
                f"{located.path}: {located.kind} does not load it: {type(error).__name__} {reason}"
            ) from None
    module = build_towers(located, weights, device)
    model = located.config.model
    size, length = model.vision.image_size, model.text.context_length
    return TowerEncoder(module, weights, size, length, device, keep_ratio)
