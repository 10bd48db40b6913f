"""Copies between host and device that the host does not wait for (on a CPU: the tensor itself), and a choice of places
that needs none."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. To a GPU it goes by page-locked memory: from any other the copy is waited for,
    and with it all the work that the device has in hand."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def begin_download(tensor: Tensor) -> Callable[[], Tensor]:
    """Begins the copy of a small tensor to the host; what is returned waits for its end."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    on_host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def finish() -> Tensor:
        arrived.synchronize()
        return on_host

    return finish


def taken(x: Tensor, places: Sequence[int], dim: int = 0) -> Tensor:
    """x at some places of a dimension, without the index tensor that a list would become, with a copy waited for."""
    first, count = places[0], len(places)
    if list(places) != list(range(first, first + count)) or first < 0:
        return torch.stack([x.select(dim, place) for place in places], dim)
    return x if count == x.shape[dim] else x.narrow(dim, first, count)
