"""Copies between host and device that the host does not wait for. On a CPU both are the tensor itself."""

from collections.abc import Callable

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
