"""What DeepSpeed imports on the way to a first step and a plain run never uses."""

import importlib
import sys

from amclip_ds.ranks.runtime import take_the_cpu

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"


def import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, unless a run has built its optimizer from it already, without torch's compiler.

    DeepSpeed asks every optimizer whether it is a Muon. The module's import decorates three functions with
    torch.compile, which then imports all of inductor: 0.8 s of CPU and 580 modules on every rank (deepspeed 0.19.8,
    docs/results/start-time.md). Delete this where `import` of that module alone leaves torch._inductor.compile_fx out.
    """
    if MUON in sys.modules:
        return
    from deepspeed.runtime import compiler

    theirs, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        importlib.import_module(MUON)
    finally:
        compiler.compile = theirs


def import_on_the_cpu() -> None:
    """Imports what DeepSpeed and torch's optimizers import late, in a process whose forks train on the CPU."""
    take_the_cpu()
    import deepspeed  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo  # noqa: F401  # at an optimizer's first step

    import_muon_uncompiled()
