"""Which safetensors files of a folder hold a model's weights. Pickles are never read, nor what links lead out to."""

import os
from collections.abc import Sequence
from pathlib import Path

from amclip_ds.errors import UserError

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a file whose name says that it is a pickle."""
    if path.suffix in PICKLES:
        raise UserError(f"{path}: a pickle, which may run code when it is read; convert it: {CONVERT}")


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The first of these names (patterns) that the folder holds: one file, or a model's parts. Raises UserError."""
    for name in names:
        found = [inside(folder, path) for path in sorted(folder.glob(name))]
        if found:
            return found
    for path in sorted(folder.iterdir()):
        refuse_pickle(path)
    raise UserError(f"{folder}: holds no weights ({', '.join(names)})")


def inside(folder: Path, path: Path) -> Path:
    """The path of a file of the folder. Raises UserError for a link out of it, but for a download cache's own."""
    real, root = Path(os.path.realpath(path)), folder.resolve()  # realpath: of a link to itself, too
    is_download = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if real.parent != root and root not in real.parents and not is_download:
        raise UserError(f"{path}: leads out of its folder, to {real}; put the file itself there")
    return path
