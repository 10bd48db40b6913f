"""Where the weights of `model.init_from` come from: a run, a checkpoint, or another library's safetensors.

Read parameter by parameter, so that no rank holds more than one whole. Pickles are never read. Values are fp32.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from amclip_ds import hub, safetensors_header
from amclip_ds.errors import UserError
from amclip_ds.model import other_libraries
from amclip_ds.model.names import first_name, present_name
from amclip_ds.model.weight_files import refuse_pickle, weight_files

Pieces = list[tuple[int, str, str]]
"""Where a tensor of a checkpoint is: (first element of the flattened tensor, file, key in it), in order."""
KINDS = {"student": ("master", "frozen"), "teacher": ("ema", "frozen", "master")}
"""Kinds of pieces by preference: what is not averaged is the student's (frozen parameters, logit_scale)."""
WHOLE = ("open_clip_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "*.safetensors")
"""An export's weights; models of the hub are often there in several libraries' forms, of which one is taken."""


class Source:
    """The tensors of a folder or file, under our names; nothing is read before it is asked for."""

    def __init__(self, path: Path, weights: str = "student") -> None:
        """weights: student | teacher, for a run or a checkpoint that has both. Raises UserError."""
        self.path = path
        self._files: dict[str, str] = {}
        self._pieces: dict[str, Pieces] = {}
        self._rules: dict[str, other_libraries.Rule] = {}
        for file in _files_of(path, weights):
            self._files |= dict.fromkeys(_keys(file), str(file))
        if any("|" in key for key in self._files):
            self.format = "checkpoint"
            self._index_pieces(weights)
        elif "vision.cls_token" in self._files:
            self.format = "amclip_ds"
            self._files = {present_name(key): file for key, file in self._files.items()}
        else:
            recognised = other_libraries.recognise(self._files)
            if recognised is None:
                raise UserError(f"model.init_from: {path} holds no names of ours, open_clip's, transformers' or timm's")
            self.format = recognised
            self._rules = other_libraries.match_keys(recognised, self._files)

    def names(self) -> list[str]:
        """Our names of what the source holds."""
        return list(self._pieces or self._rules or self._files)

    def unused_keys(self) -> list[str]:
        """The source's keys that are none of our parameters."""
        if not self._rules:
            return []
        used = {key for rule in self._rules.values() for key in rule.theirs}
        return sorted(set(self._files) - used)

    def origin(self, name: str) -> str:
        """The key, or keys, that a parameter comes from."""
        if name in self._rules:
            rule = self._rules[name]
            part = f" [{rule.ours.index(name) + 1} of 3]" if len(rule.ours) == 3 else ""
            return " + ".join(rule.theirs) + part
        return name

    def read(self, name: str) -> Tensor | None:
        """One tensor in fp32 (counters int64), flat where it comes in pieces; None where the source lacks it."""
        if self._pieces:
            return self._read_pieces(name) if name in self._pieces else None
        if self._rules:
            return (
                other_libraries.import_tensor(self._rules[name], name, self._read_key).contiguous()
                if name in self._rules
                else None
            )
        return self._read_key(name) if name in self._files else None

    def _read_key(self, key: str) -> Tensor:
        try:
            with safe_open(self._files[key], "pt") as file:
                tensor = file.get_tensor(key if key in file.keys() else first_name(key))  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.init_from: {self._files[key]}: {error}") from None
        return tensor.float() if tensor.is_floating_point() else tensor

    def _index_pieces(self, weights: str) -> None:
        by_kind: dict[str, dict[str, Pieces]] = {kind: {} for kind in KINDS[weights]}
        for key, file in self._files.items():
            piece = safetensors_header.PIECE.fullmatch(key)
            if piece is None:
                raise UserError(f"model.init_from: {file}: {key[:200]!r} is no name of a piece of a checkpoint")
            if piece[1] in by_kind:
                by_kind[piece[1]].setdefault(present_name(piece[2]), []).append((int(piece[3]), file, key))
        if not by_kind[KINDS[weights][0]]:
            raise UserError(f"{self.path}: holds no {weights}")
        for kind in reversed(KINDS[weights]):  # the preferred kind has the last word
            self._pieces |= {name: sorted(pieces) for name, pieces in by_kind[kind].items()}

    def _read_pieces(self, name: str) -> Tensor:
        parts, at = [], 0
        for start, file, key in self._pieces[name]:
            if start != at:
                raise UserError(f"model.init_from: {file}: elements of {name} are missing or there twice")
            parts.append(self._read_key(key).flatten())
            at += parts[-1].numel()
        return torch.cat(parts)


@lru_cache(maxsize=4)
def open_source(path: str, weights: str = "student") -> Source:
    """The source at a path, opened once."""
    return Source(hub.local(path), weights)


def loaded_tensor(source: str, name: str, shape: Sequence[int]) -> Tensor | None:
    """The parameter of that name, or None where the source lacks it (a head that the other run did not train).

    Positions of another grid or length and patches of another size are resampled (RESAMPLED); the patch bias that some
    libraries lack is zero.
    Raises UserError for a tensor of another shape, or in pieces that do not make it whole.
    """
    found = open_source(source)
    tensor = found.read(name)
    if tensor is None:
        if name == "vision.patch_embed.proj.bias" and "vision.patch_embed.proj.weight" in found.names():
            return torch.zeros(tuple(shape))
        return None
    return fit(tensor, name, shape, source)


def fit(tensor: Tensor, name: str, shape: Sequence[int], source: str) -> Tensor:
    """The tensor in the shape that the model wants. Raises UserError where it cannot be."""
    wanted = tuple(shape)
    long_axes = [[size for size in sizes if size > 1] for sizes in (tensor.shape, wanted)]
    if tensor.numel() == math.prod(wanted) and (tensor.dim() == 1 or long_axes[0] == long_axes[1]):
        return tensor.reshape(wanted)
    if resample := RESAMPLED.get(name):
        resampled = resample(tensor, wanted)
        if resampled is not None:
            return resampled
    raise UserError(f"model.init_from: {name} is {list(tensor.shape)} in {source}, the model's is {list(wanted)}")


def resample_positions(positions: Tensor, wanted: Sequence[int]) -> Tensor | None:
    """[1, 1 + n, D] -> [1, 1 + m, D], bicubic over the square grid; the CLS row stays, where there is one (DeiT III's
    class token has no position). None: of another width, or where one has the row and the other lacks it."""
    from timm.layers import resample_abs_pos_embed

    _, length, width = wanted
    if positions.numel() % width:
        return None
    positions, side = positions.reshape(1, -1, width), math.isqrt(length)
    prefix = length - side**2
    if positions.shape[1] - math.isqrt(positions.shape[1]) ** 2 != prefix:
        return None
    return resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=prefix)


def resample_text_positions(positions: Tensor, wanted: Sequence[int]) -> Tensor | None:
    """[n, W] -> [m, W]: more are interpolated linearly (align_corners false); of fewer the first stay, so that texts
    that fit read as before. None: of another width."""
    length, width = wanted
    if positions.numel() % width or positions.dim() == 2 and positions.shape[1] != width:
        return None
    positions = positions.reshape(-1, width)  # flat, where it came in pieces
    if length <= positions.shape[0]:
        return positions[:length].contiguous()
    return F.interpolate(positions.T[None], size=length, mode="linear", align_corners=False)[0].T.contiguous()


def resample_patches(weight: Tensor, wanted: Sequence[int]) -> Tensor | None:
    """[D, 3, p, p] -> [D, 3, q, q]: so that images resized from p to q pixels a patch give what they gave (FlexiViT's
    pseudo-inverse). None: of another width."""
    from timm.layers import resample_patch_embed

    width, channels, *_ = wanted
    side = math.isqrt(weight.numel() // (width * channels))
    if weight.numel() != width * channels * side**2 or weight.dim() == 4 and weight.shape[0] != width:
        return None
    return resample_patch_embed(weight.reshape(width, channels, side, side), list(wanted[2:]))


RESAMPLED: dict[str, Callable[[Tensor, Sequence[int]], Tensor | None]] = {
    "vision.pos_embed": resample_positions,
    "text.embeddings.position_embedding.weight": resample_text_positions,
    "vision.patch_embed.proj.weight": resample_patches,
}


def describe(source: str, names: Iterable[str]) -> list[str]:
    """Lines for the log: which parameter comes from where, what starts at random, what of the source is left out."""
    found = open_source(source)
    held, wanted = set(found.names()), list(names)
    taken = [name for name in wanted if name in held]
    zero = [name for name in wanted if name == "vision.patch_embed.proj.bias" and name not in held and taken]
    missing = [name for name in wanted if name not in held and name not in zero]
    left = found.unused_keys() + sorted(held - set(wanted))
    lines = [f"model.init_from: {len(taken)} of {len(wanted)} parameters from {source} ({found.format})"]
    lines += [f"  {name} <- {found.origin(name)}" for name in taken if found.origin(name) != name]
    lines += [f"  {name}: zeros, {found.format} has none" for name in zero]
    lines += [f"  {name}: not in the source, starts at random" for name in missing]
    lines += [f"  left out: {key}" for key in left]
    return lines


def _files_of(path: Path, weights: str) -> list[Path]:
    try:
        refuse_pickle(path)
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UserError(f"no such file or folder: {path}")
        if (path / "manifest.json").is_file():  # a checkpoint
            averaged = sorted((path / "ema").glob("*.safetensors")) if weights == "teacher" else []
            return [*weight_files(path, ("model/*.safetensors",)), *averaged]
        if (path / f"{weights}.safetensors").is_file():  # a run
            return [path / f"{weights}.safetensors"]
        return weight_files(path, WHOLE)
    except UserError as error:
        raise type(error)(f"model.init_from: {error}") from None


def _keys(file: Path) -> list[str]:
    try:
        return list(safetensors_header.read(file).entries)
    except UserError as error:
        raise type(error)(f"model.init_from: {error}") from None
