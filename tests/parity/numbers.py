"""A file of the oracle of other methods: its tensors, what its json says, and which tensors a check has read."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from amclip_ds.comm import SingleProcess
from amclip_ds.masks import cluster
from amclip_ds.masks.selection import pixels_of

ALONE = SingleProcess()
LOSS, GRADIENT, SIMILARITY = 1e-6, 1e-5, 5e-6
"""of losses relative, of a gradient by its tensor's largest, of cosines absolute"""


class Images(NamedTuple):
    grey: Tensor
    """[B, H, W] in [0, 1]"""
    pixels: Tensor
    """[B, N, 768] normalised as the json says, as a mask sees them"""
    vectors: Tensor
    """[B, N, 768] of unit length"""


@dataclass
class Numbers:
    """`numbers[name]` is a tensor, and remembers that it was read."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    read: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def seed(self) -> int:
        return int(self.path.stem.rpartition("_seed")[2])

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.meta["cases"]

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]


def load(path: Path) -> Numbers:
    """A *.safetensors file and the *.json beside it."""
    return Numbers(path, load_file(path), json.loads(path.with_suffix(".json").read_text()))


def images_of(numbers: Numbers) -> dict[str, Images]:
    """The inputs of cluster and pgs, by name."""
    return _images(numbers.path.parent / f"images_seed{numbers.seed}.safetensors")


@cache
def _images(path: Path) -> dict[str, Images]:
    found = load(path)
    words = found.meta["normalise"].replace(",", " ").split()
    mean, std = (
        torch.tensor([float(word) for word in words[words.index(key) + 1 :][:3]]).view(3, 1, 1)
        for key in ("mean", "std")
    )
    plain = {name: tensor.float() / 255 for name, tensor in found.tensors.items()}
    return {name: _prepared(x, (x - mean) / std) for name, x in plain.items()}


def _prepared(plain: Tensor, normalised: Tensor) -> Images:
    pixels = pixels_of(normalised, plain.shape[-1] // 16)
    return Images(plain.mean(1), pixels, cluster.unit_length(pixels))


def close(ours: Tensor, theirs: Tensor, what: str, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """rtol: of their tensor's largest element."""
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} instead of {list(theirs.shape)}"
    allowed = atol + rtol * float(theirs.double().abs().max())
    off = float((ours.detach().double() - theirs.double()).abs().max())
    assert off <= allowed, f"{what} off by {off:.3g}, allowed {allowed:.3g}"


def close_loss(ours: Tensor, theirs: float, what: str) -> None:
    off = abs(float(ours.detach()) - theirs) / abs(theirs)
    assert off <= LOSS, f"{what} is {float(ours)}, not {theirs}: off by {off:.3g} of it"


def close_gradient(ours: Tensor | None, theirs: Tensor, what: str) -> None:
    close(torch.zeros_like(theirs) if ours is None else ours, theirs, f"gradient of {what}", rtol=GRADIENT)


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Exactly equal numbers, whatever their integer type."""
    assert torch.equal(ours.long(), theirs.long()), f"{what}: {ours.tolist()} instead of {theirs.tolist()}"
