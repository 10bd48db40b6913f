"""Makes `import torchvision` work on a CPU-only torch; does nothing where torchvision's own operators load.

The one torchvision wheel on the package index is a CUDA build. Beside a CPU-only torch its `_C.so` does not load, and
`import torchvision` then dies with `operator torchvision::nms does not exist`, taking timm, open_clip and transformers'
pipelines with it. Declaring the two operator schemas is enough for the transforms; `torchvision.ops.nms` itself stays
unusable.

Installed beside the package (pyproject.toml, data-files) with a .pth file, so that every Python of the environment has
it, whether it imports amclip_ds or not. At start-up nothing but one finder is registered: no torch is imported.
"""

import sys

SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept_alive = []  # a collected Library takes its schemas with it


class Finder:
    """Finds nothing; it waits for the module in which torchvision first needs its operators."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """None, always. By now `torchvision.extension` has loaded the operators, or could not."""
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(Finder)
            declare_missing()


def declare_missing():
    """Declares the operators that torchvision's library did not. Returns their names (empty on a working install)."""
    import torch

    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _kept_alive.append(library)
        for name in missing:
            library.define(SCHEMAS[name])
    return missing


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)
