"""What a training step asks of the host: numbers read from tensors, tensors made of the host's data, operators."""

import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")  # by a mask it counts what is chosen, unseen


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class HostTraffic(TorchDispatchMode):
    """Counts, of what runs inside, reads (on a GPU each waits for the device, unless its tensor is on the CPU) and
    tensors that no operator made: of Python numbers, lists or numpy, which on a GPU are copied there; and operators.

    What exists when it is made counts for nothing. The memory of all results is kept, so that none is used again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.uploads, self.operators = Counter[str](), 0, 0
        held = [found for found in gc.get_objects() if isinstance(found, Tensor)]
        self._kept = [tensor.untyped_storage() for tensor in held if tensor.device.type == "cpu"]
        self._known = {storage.data_ptr() for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.uploads += self._note((args, kwargs))
        name = func.name().partition(".")[0]
        if name in READS or (name in INDEXING and any(is_mask(index) for index in args[1])):
            self.reads[name] += 1
        result = func(*args, **(kwargs or {}))
        self._note(result)
        return result

    def _note(self, held: Any) -> int:
        """Takes the tensors of an operator as known; how many were not."""
        storages = [leaf.untyped_storage() for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]
        new = {storage.data_ptr(): storage for storage in storages if storage.data_ptr()}.keys() - self._known
        self._known |= new
        self._kept += storages
        return len(new)


def traffic(recipe: str, words: Sequence[str] = (), spoilt: str = "") -> dict[str, int]:
    """Reads, uploads and operators of the third step of a recipe, one rank.

    spoilt, for twins: index_list or loss, what is done as it once was; each_weight, something done to every weight.
    """
    from amclip_ds import step
    from benchmarks.step import Ours, made_scenes

    with made_scenes(8) as scenes:
        ours = Ours(recipe, list(words), 8, (8, 20), scenes)
    if spoilt == "index_list":
        step.taken = lambda x, places, dim=0: x[list(places)]  # type: ignore[assignment,misc]
    if spoilt == "loss":
        admit = ours.guards.admit
        ours.guards.admit = lambda losses: admit(losses) * float(float(losses.total) < 1e9)  # type: ignore[method-assign]
    if spoilt == "each_weight":
        clamp = ours.student.clamp_logit_scale
        weights = list(ours.student.module.parameters())
        ours.student.clamp_logit_scale = lambda: (clamp(), [weight.data.mul_(1.0) for weight in weights])  # type: ignore[method-assign]
    for _ in range(2):
        ours.step()
    with HostTraffic() as seen:
        ours.step()
    return {"reads": sum(seen.reads.values()), "uploads": seen.uploads, "operators": seen.operators}
