"""Measures what tensors a piece of code makes: the largest, and the peak of the bytes alive at once."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts storages made inside the `with`, forward and backward (on the CPU, backward runs in the same thread)."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak_bytes = 0
        self.largest_numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage(), tensor.element_size())
        return out

    def _see(self, storage: torch.UntypedStorage, element_size: int) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, key, None)
        self.largest_numel = max(self.largest_numel, storage.nbytes() // element_size)
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
