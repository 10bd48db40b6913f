"""Reads a folder of DeepSpeed's `save_checkpoint`. It is pickled: reading it runs the code in it."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclip_ds.errors import UserError, in_one_line
from amclip_ds.files import read_text


@dataclass
class DeepSpeedFolder:
    """The whole state of a ZeRO engine, at any stage and world size, on the CPU."""

    stage: int
    world_size: int
    tensors: dict[str, dict[str, Tensor]]
    """master, frozen and the optimizer's moments -> parameter -> tensor in its shape"""
    buffers: dict[str, Tensor]
    counters: dict[str, float]
    """the optimizer's `step`"""
    global_steps: int
    skipped_steps: int


def read_deepspeed_folder(folder: Path, tag: str | None = None) -> DeepSpeedFolder:
    """Reads `folder`/`tag` (None: what its `latest` names). Runs pickled code: only for folders that are trusted.

    Raises UserError for what is no such folder, or was saved without ZeRO.
    """
    from deepspeed.utils import zero_to_fp32 as theirs

    if tag is None:
        try:
            tag = read_text(folder / "latest", 1000).strip()
        except UserError as error:
            raise UserError(f"{error}; name the tag with --tag") from None
    place = str(folder / tag)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            models = theirs.parse_model_states(theirs.get_model_state_files(place))
            saved = [_load(file) for file in theirs.get_optim_files(place)]
            counts = _load(theirs.get_model_state_files(place)[0])
            held = [one["optimizer_state_dict"] for one in saved]
            stage = int(held[0]["zero_stage"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{place}: no ZeRO checkpoint of DeepSpeed: {in_one_line(error, 300)}") from None
        flats = [one["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for one in held]
        inner = [one["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"] for one in held]

        def whole(groups: list[list[Tensor]], frozen: bool) -> dict[str, Tensor]:
            """Flat groups of all ranks -> parameters; their own merging, which any flat state of the layout passes."""
            if stage == 3:
                merged = theirs._get_fp32_state_dict_from_zero3_checkpoint(len(held), groups, models, not frozen)
            else:
                paddings = held[0].get("param_alignment_paddings")
                merged = theirs._get_fp32_state_dict_from_zero2_checkpoint(
                    len(held), groups, models, not frozen, paddings
                )
            merged = {name: value for name, value in merged.items() if name not in models[0].buffers}
            return {name: tensor.detach().clone() for name, tensor in theirs.to_torch_tensor(merged).items()}

        masters = whole(flats, frozen=False)
        frozen = {name: value for name, value in whole(flats, frozen=True).items() if name not in masters}
        tensors = {"master": masters, "frozen": frozen}
        first: dict[str, Any] = next(iter(inner[0].values()), {})
        if len({frozenset(state) for states in inner for state in states.values()}) > 1:
            raise UserError(f"{place}: its groups have different states (of Muon?), whose layout is not known here")
        for key in [key for key, value in first.items() if torch.is_tensor(value) and value.dim() > 0]:
            moments = [
                [states[index][key][: flat.numel()] for index, flat in enumerate(groups)]
                for states, groups in zip(inner, flats, strict=True)
            ]
            tensors[key] = whole(moments, frozen=False)
    counters = {"step": float(first["step"])} if "step" in first else {}
    return DeepSpeedFolder(
        stage,
        len(held),
        tensors,
        dict(models[0].buffers),
        counters,
        int(counts.get("global_steps", 0)),
        int(counts.get("skipped_steps", 0)),
    )


def _load(file: str) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=False)
