"""Memory and time of the image-text losses at many ranks, each rank's part in one process: gathered, and on a ring.

    python -m benchmarks.losses --batch 512 --ranks 1 2 4 8 16 --chunk 128
    python -m benchmarks.losses --batch 131072 --ranks 8 --chunk 2048 --repeats 3      # a global batch of 1 M, on a GPU
    python -m benchmarks.losses --batch 131072 --ranks 8 --chunk 2048 --count          # its bytes alone, anywhere

A rank's work is done as it is among `--ranks` of them, all ranks alike: what would come over the network is a copy of
what is here. So the memory is a rank's own, and the time its computing; the network's time is not in it (the ring sends
B x E numbers a rank and tile, forward one, backward two; the gathering as much in all). One row a loss and number of
ranks: peak bytes beside the features (on a GPU the allocator's, on a CPU those of the tensors that live), the median of
the forward and backward, and what autograd keeps in between. --count runs nothing: tensors without memory are made and
let go as the loss would, and their bytes counted, so that any size can be asked for.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.objectives import ring
from amclip_ds.objectives.contrastive import info_nce
from amclip_ds.objectives.sigmoid import sigmoid
from benchmarks.tensor_memory import TensorMemory

LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "softmax gather": (info_nce, 3),
    "softmax ring": (ring.info_nce, 3),
    "sigmoid recomputed": (sigmoid, 4),
    "sigmoid ring": (ring.sigmoid, 4),
}  # name -> (loss, how many of images, texts, scale, bias it takes)


class Alike(SingleProcess):
    """A rank among `world_size` that all have the same: what arrives is a tensor of its own."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.world_size)

    def ring_shift(self, x: Tensor) -> Tensor:
        return x.clone()

    def ring_ahead(self, x: Tensor) -> Callable[[], Tensor]:
        arrived = x.clone()
        return lambda: arrived


def features(views: int, batch: int, width: int, device: torch.device) -> list[Tensor]:
    """images [V, B, E], texts [B, E], scale (1,), bias (1,): leaves."""
    if device.type == "meta":
        sizes = ((views, batch, width), (batch, width), (1,), (1,))
        return [torch.empty(size, device=device, requires_grad=True) for size in sizes]
    draw = torch.Generator(device).manual_seed(0)
    rows = [
        F.normalize(torch.randn(*shape, width, generator=draw, device=device), dim=-1)
        for shape in ((views, batch), (batch,))
    ]
    numbers = [torch.tensor([value], device=device) for value in (14.3, -10.0)]
    return [tensor.requires_grad_() for tensor in (*rows, *numbers)]


def measured(name: str, leaves: list[Tensor], world_size: int, chunk: int, repeats: int) -> dict[str, Any]:
    """One row. The seconds are None where nothing is computed."""
    loss, taken = LOSSES[name]
    given, on_gpu = leaves[:taken], leaves[0].is_cuda
    repeats = 0 if leaves[0].is_meta else repeats
    kept: dict[int, int] = {}

    def once() -> Tensor:
        value = loss(*given, Alike(world_size), chunk)
        torch.autograd.grad(value, given)
        return value

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    seconds = []
    for _ in range(repeats):
        begin(on_gpu)
        start = time.perf_counter()
        once()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() - sum(tensor.nbytes for tensor in leaves)
    else:
        with TensorMemory() as memory:
            once()
        peak = memory.peak_bytes
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(*given, Alike(world_size), chunk)
    return {
        "loss": name,
        "ranks": world_size,
        "batch": given[1].shape[0],
        "chunk": chunk,
        "peak_mib": peak / 2**20,
        "kept_mib": sum(kept.values()) / 2**20,
        "seconds": statistics.median(seconds) if seconds else None,
    }


def begin(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="samples of a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=128, help="loss.chunk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--count", action="store_true", help="count bytes, compute nothing")
    parser.add_argument("--json", help="also write the rows there")
    args = parser.parse_args()
    device = torch.device("meta" if args.count else "cuda" if torch.cuda.is_available() else "cpu")
    leaves = features(args.views, args.batch, args.width, device)
    rows = []
    for name in args.losses:
        for world_size in args.ranks:
            rows.append(measured(name, leaves, world_size, args.chunk, args.repeats))
            row = rows[-1]
            took = "" if row["seconds"] is None else f", {row['seconds']:8.3f} s"
            memory = f"peak {row['peak_mib']:9.1f} MiB, kept {row['kept_mib']:8.1f} MiB"
            print(f"{name:18} {world_size:4} ranks: {memory}{took}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
