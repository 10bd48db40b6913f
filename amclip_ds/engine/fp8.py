"""fp8 in the Linear layers of the towers' blocks, through torchao: what engine.fp8 asks for.

A layer is replaced before torch.compile and DeepSpeed take the model, and keeps its Parameter objects under their
names: masters, average, checkpoints and exports are those of a bf16 run. Weights, activations and (of the student)
gradients are cast at each product, by one scale a tensor that is measured there and then, so nothing of it is state.
The last block stays as it is: where only the pooled token is read, its products are too small to gain, and what leaves
the tower is then not rounded to fp8. docs/adr/0054 has the reasons.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from amclip_ds.errors import UserError, in_one_line
from amclip_ds.ranks.collectives import gather_objects

MULTIPLE = 16  # what the hardware's product takes of both sizes of a layer
CAPABILITY = (8, 9)  # of the first cards with fp8 units


def check_machine(device: torch.device) -> None:
    """Raises UserError, on all ranks, where a rank's device has no fp8 or torchao does not load. Collective."""
    problem = next((theirs for theirs in gather_objects(_why_not(device)) if theirs), None)
    if problem:
        raise UserError(f"engine.fp8: {problem}; use engine.fp8=none")


def why_no_units(device: torch.device) -> str | None:
    """What a device lacks for fp8, in words; None: nothing."""
    if device.type != "cuda":
        return "fp8 needs a GPU (Hopper, Ada or newer), and this run is on the CPU"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no fp8 units (compute capability {found[0]}.{found[1]}; it takes 8.9 or more)"
    return None


def convert_towers(model: nn.Module, *, with_text: bool, emulate: bool = False) -> str:
    """Gives the blocks of a student's or teacher's image tower, and text tower, fp8 layers in place. Returns how many,
    in words.

    emulate: the same rounding by slow arithmetic that any device has; for tests and benchmarks/fp8.py, no setting
    reaches it.
    """
    vision: Any = model.vision
    text: Any = model.text
    towers = {"image": list(vision.blocks)} | ({"text": list(text.encoder.layers)} if with_text else {})
    found = {name: _convert(blocks, emulate) for name, blocks in towers.items()}
    return ", ".join(f"{done} of {there} in the {name} tower" for name, (done, there) in found.items())


def _convert(blocks: Sequence[nn.Module], emulate: bool) -> tuple[int, int]:
    """How many Linear layers were converted, and how many there are."""
    torchao = _torchao()
    # Without padding a batch whose tokens are no multiple of 16 would end the run at its weights' gradient.
    config = torchao.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    linear = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    taken = [layer for block in blocks[:-1] for layer in block.modules() if _fits(layer)]
    for block in blocks[:-1]:
        torchao.convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, name: _fits(layer))
    return len(taken), len(linear)


def _fits(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear:  # one with a forward of its own keeps it
        return False
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _why_not(device: torch.device) -> str | None:
    if problem := why_no_units(device):
        return problem
    try:
        _torchao()
    except ImportError as error:
        return f"torchao cannot be imported ({in_one_line(error, 150)}): pip install 'amclip_ds[fp8]'"
    except Exception as error:  # a version that does not fit this torch may raise anything
        return f"torchao does not load here ({type(error).__name__}: {in_one_line(error, 150)})"
    return None


def _torchao() -> Any:
    """torchao.float8, without the lines about compiled parts that did not load: none of them is needed here."""
    log = logging.getLogger("torchao")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import torchao.float8
    finally:
        log.setLevel(level)
    return torchao.float8
