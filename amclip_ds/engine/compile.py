"""torch.compile, block by block: the towers' blocks are alike, so one compilation serves them all.

Where the compiler does not work, the blocks stay as they are, and one line says so: a run must not end for want of a
compiler on one machine. The ranks decide together, so that all of them run the same arithmetic.
"""

import warnings

import torch
from torch import nn

from amclip_ds.engine.collectives import gather_objects
from amclip_ds.errors import in_one_line


def compile_blocks(towers: list[nn.ModuleList], stage: int) -> str | None:
    """Compiles every block in place; returns why not, or None. Names of parameters stay.

    Collective: every rank must call.
    """
    problem = _why_not(stage)
    problem = next((theirs for theirs in gather_objects(problem) if theirs), None)
    if problem:
        warnings.warn(f"engine.compile: {problem}; the blocks run uncompiled", stacklevel=2)
        return problem
    torch._dynamo.config.suppress_errors = True  # a block that fails later runs uncompiled, with a warning
    for tower in towers:
        for block in tower:
            block.compile()
    return None


def _why_not(stage: int) -> str | None:
    """What keeps torch.compile from working here, found by compiling something small."""
    if stage == 3:
        return "at ZeRO-3 a block's weights come and go between its parts, which torch.compile cannot hold"
    try:
        torch.compile(_probe)(torch.ones(8))
    except Exception as error:  # whatever the compiler's toolchain raises
        reason = f"{type(error).__name__}: {in_one_line(error, 150)}"
        return f"torch.compile does not work on this machine ({reason})"
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) + 1
