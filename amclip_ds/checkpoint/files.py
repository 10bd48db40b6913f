"""Which files a rank writes for a state, and what is in each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from amclip_ds.checkpoint import manifest, tensorfile
from amclip_ds.checkpoint.state import CheckpointState, random_state
from amclip_ds.engine.shards import Shard


@dataclass
class PlannedFile:
    """A file as the pieces that follow each other in it; tensors are views into the state until they are written."""

    path: str
    pieces: list[bytes | Tensor]

    @property
    def length(self) -> int:
        """Bytes."""
        return sum(len(p) if isinstance(p, bytes) else p.numel() * p.element_size() for p in self.pieces)

    def content(self) -> Iterator[bytes | memoryview]:
        """The bytes, tensor by tensor."""
        for piece in self.pieces:
            yield piece if isinstance(piece, bytes) else tensorfile.bytes_of(piece.detach().cpu())


def plan(state: CheckpointState, rank: int, world_size: int) -> list[PlannedFile]:
    """This rank's files; rank 0's also are those that exist once."""
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optim": {}, "ema": {}}
    for kind, held in state.sharded.items():
        folder = manifest.FOLDER_OF_KIND.get(kind, "optim")
        for name, shard in held.items():
            part = share(shard, rank, world_size) if kind in state.whole else shard
            if part.length:
                tensors[folder][manifest.key_of(kind, name, part.start, part.length)] = part.tensor.detach()
    files = [_tensor_file(f"{folder}/rank{rank:04d}.safetensors", held) for folder, held in tensors.items() if held]
    files.append(_json_file(f"rng/rank{rank:04d}.json", random_state()))
    if rank == 0:
        flat = {name: buffer.detach().contiguous() for name, buffer in state.replicated.items()}
        files.append(_tensor_file(manifest.REPLICATED, flat))
        files.append(_json_file("trainer.json", state.small))
        files.append(PlannedFile("config.yaml", [state.config.encode()]))
    return files


def share(shard: Shard, rank: int, world_size: int) -> Shard:
    """This rank's part of what every rank holds whole."""
    first, last = shard.numel * rank // world_size, shard.numel * (rank + 1) // world_size
    return Shard(shard.tensor.view(-1)[first:last], first, last - first, shard.numel)


def _tensor_file(path: str, tensors: dict[str, Tensor]) -> PlannedFile:
    header = tensorfile.build_header(tensors, {"format": "pt"})
    return PlannedFile(path, [header, *(tensor.view(-1) for tensor in tensors.values())])


def _json_file(path: str, content: dict) -> PlannedFile:
    return PlannedFile(path, [json.dumps(content, sort_keys=True).encode()])


def tensor_sizes(state: CheckpointState) -> dict[str, dict[str, int]]:
    """kind -> parameter -> elements of the whole, of what this rank holds a part of."""
    return {kind: {name: shard.numel for name, shard in held.items()} for kind, held in state.sharded.items() if held}
