"""Makes `import torchvision` work on a CPU-only torch; does nothing where torchvision's own operators load.

The one torchvision wheel on the package index is a CUDA build. Beside a CPU-only torch its `_C.so` does not load, and
`import torchvision` then dies with `operator torchvision::nms does not exist`, taking timm and open_clip with it.
Declaring the two operator schemas is enough for the transforms; `torchvision.ops.nms` itself stays unusable.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept_alive: list["torch.library.Library"] = []  # a collected Library takes its schemas with it


def mend() -> list[str]:
    """Declares the missing operators, if any. Returns the names declared here (empty on a working install)."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    extension = Path(spec.origin).parent / "_C.so"
    if extension.exists():
        with contextlib.suppress(OSError):  # a CUDA build beside a CPU-only torch: what is missing is declared below
            torch.ops.load_library(str(extension))
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _kept_alive.append(library)
        for name in missing:
            library.define(SCHEMAS[name])
    return missing


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; asked for torchvision, it steps aside and mends, so that whoever never needs it loads no torch."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            mend()
        return None


def mend_when_imported() -> None:
    """Mends right before torchvision is imported, whoever imports it."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())
