"""What ZeRO-3 is given beside its file: towers' blocks fetched whole; on one rank, where nothing is sharded, less work.

A block fetched whole (DeepSpeed calls it a leaf module) has one fetch, one release and one set of hooks, where else
each of its layers has them; its parts have no hooks, so that torch.compile can take it (docs/adr/0053).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def with_weights_in_place(ds: dict[str, Any]) -> dict[str, Any]:
    """A config of stage 3 for one rank: gradients are averaged as one run instead of tensor by tensor, and a linear
    layer, which need not let go of its weight until the backward pass, is torch's own."""
    alone = {"reduce_scatter": False, "memory_efficient_linear": False}
    return ds | {"zero_optimization": ds["zero_optimization"] | alone}


def keep_weights_in_place(optimizer: Any) -> None:
    """On one rank: fetches all weights once, and takes away the hooks that would release and fetch them again.

    A weight's shard is the weight itself then, the same memory: a step, which writes shards, is seen by the next
    forward.
    """
    offload = optimizer.parameter_offload
    offload.destroy()
    parameters: list[Any] = list(offload.module.parameters())
    parameters[0].all_gather(parameters)
    assert all(p.data_ptr() == p.ds_tensor.data_ptr() for p in parameters)
    optimizer._partition_all_parameters = lambda: None


def forget_modules() -> None:
    """Outside of any forward pass: DeepSpeed's stack of the modules in one keeps each engine's outermost for good, and
    so its weights."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()


def gather_what_is_written(engine: Any) -> None:
    """Where an engine gathers weights in a stream of its own: that one waits, at each forward, for what the forward's
    stream has written to the shards before (a step, a clamp, the teacher's publishing, a checkpoint).

    DeepSpeed has a forward wait for its gathers, but no gather for a step: with `overlap_comm` it might read shards
    that are not written yet. Its throughput timer, which we leave off, hides that (docs/adr/0057).
    """
    from deepspeed.accelerator import get_accelerator

    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    stream = offload._DeepSpeedZeRoOffload__allgather_stream
    if stream is None:  # a CPU, which has none
        return

    def wait(*_: Any) -> None:
        stream.wait_stream(get_accelerator().current_stream())

    engine.module.register_forward_pre_hook(wait, prepend=True)  # before DeepSpeed's, the first of which gathers


def fetch_blocks_whole(model: nn.Module) -> None:
    """Marks each block of both towers for ZeRO-3, before deepspeed.initialize: its parts are called by it alone."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks_of(model):
        set_z3_leaf_module(block, True)


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks of both towers of a student or teacher."""
    return [*model.vision.blocks, *model.text.encoder.layers]


@contextlib.contextmanager
def gradients_by_parameter() -> Iterator[None]:
    """While deepspeed.initialize runs: a gradient is reduced when it is whole, in blocks fetched whole as elsewhere.

    DeepSpeed would reduce a block's gradients after each of its calls, with zeros for what is not there yet. Texts in
    groups and several passes over views call it more than once in a forward.
    """
    from deepspeed.runtime.zero import stage3

    kept = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = kept


def take_one_norm(optimizer: Any) -> None:
    """Takes the norm of a group's gradients by one call for all, where DeepSpeed takes hundreds in fp64."""
    assert hasattr(optimizer, "get_grad_norm_direct")
    optimizer.get_grad_norm_direct = _norm_of


def _norm_of(gradients: list[Tensor], params: list[nn.Parameter], norm_type: float = 2) -> Tensor:
    """Over all ranks; -1 where it is not finite, as DeepSpeed has it. Collective: every rank must call."""
    norms = torch._foreach_norm(gradients, norm_type, dtype=torch.float32)
    squares = torch.stack(norms).double().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))
