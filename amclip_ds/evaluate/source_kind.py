"""What a SOURCE is by the files in its folder: a run, a checkpoint or an export. Loads no torch."""

from pathlib import Path

from amclip_ds import hub, run_files
from amclip_ds.errors import UserError

RUN, CHECKPOINT = "run", "checkpoint"
KINDS = {  # a file in the folder -> what the folder is
    run_files.MANIFEST: CHECKPOINT,
    run_files.CONFIG: RUN,
    "open_clip_config.json": "open_clip",
    "config.json": "hf",
    "clip_onnx.json": "onnx",
}


def kind_of(path: Path) -> str:
    """run | checkpoint | open_clip | hf (timm's too) | onnx. Raises UserError where it is none of them."""
    kind = next((kind for name, kind in KINDS.items() if (path / name).is_file()), None)
    if kind is None:
        hint = run_files.near_miss(path) if path.exists() else hub.missing(str(path))
        raise UserError(f"{path}: neither a run (config.yaml), a checkpoint ({run_files.MANIFEST}) nor an export{hint}")
    return kind


def check(source: str | Path) -> None:
    """Raises UserError, before anything heavy is loaded, for a path at which there is no model."""
    if not hub.is_hub_name(str(source)):
        kind_of(hub.local(str(source)))
