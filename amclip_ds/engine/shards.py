"""This rank's part of the fp32 state, by parameter name, the same way at every ZeRO stage.

`master_shards` and `optimizer_shards` return views into DeepSpeed's own memory: writing to a view changes the state.
After masters were written, `refresh_from_masters` brings the weights that the forward reads up to date.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amclip_ds.model.init import persistent_buffers


@dataclass(frozen=True)
class Shard:
    """A run of elements of a flattened tensor: [start, start + length) of numel."""

    tensor: Tensor
    """[length], a view"""
    start: int
    length: int
    numel: int


def master_shards(engine: Any) -> dict[str, Shard]:
    """This rank's fp32 masters. A parameter of which this rank owns nothing is absent. Stage 0: everything, whole."""
    return master_shards_of(dict(engine.module.named_parameters()))


def master_shards_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Shard]:
    """Likewise, of the given parameters; frozen ones have no master."""
    found = {name: _shard(parameter, None) for name, parameter in parameters.items() if parameter.requires_grad}
    return {name: shard for name, shard in found.items() if shard is not None}


def optimizer_shards(engine: Any) -> dict[str, dict[str, Shard]]:
    """This rank's optimizer moments: name -> state key (exp_avg, ...) -> Shard aligned with the master's."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and _shard(parameter, None) is not None:
            found[name] = {key: _moment(engine, parameter, key) for key in moment_keys(engine)}
    return found


def moment_keys(engine: Any) -> list[str]:
    """Names of the optimizer's per-element states; empty before the first step."""
    for state in base_optimizer(engine).state.values():
        return [key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0]
    return []


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's wrapping."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _moment(engine: Any, parameter: nn.Parameter, key: str) -> Shard:
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        state = base_optimizer(engine).state[parameter][key]
        return Shard(state.view(-1), 0, parameter.numel(), parameter.numel())
    shard = _shard(parameter, key)
    assert shard is not None
    return shard


def _shard(parameter: Any, key: str | None) -> Shard | None:
    if hasattr(parameter, "ds_id"):
        return _stage_3_shard(parameter, key)
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.lp_fragment_address
        return Shard(mapping.get_hp_fragment(key), address.start, address.numel, parameter.numel())
    return Shard(parameter.data.view(-1), 0, parameter.numel(), parameter.numel())


def _stage_3_shard(parameter: Any, key: str | None) -> Shard | None:
    partition = parameter.ds_tensor.ds_numel
    start = partition * dist.get_rank()
    length = min(partition, parameter.ds_numel - start)
    if length <= 0:
        return None
    view, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=True, optim_state_key=key
    )
    return Shard(view.view(-1)[:length], start, length, parameter.ds_numel)


@torch.no_grad()
def refresh_from_masters(engine: Any) -> None:
    """Copies the fp32 masters into the weights that the forward reads. Collective: every rank must call."""
    if not any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in engine.module.parameters()):
        return  # stage 0: the weights are the masters
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            shard = _stage_3_shard(parameter, None)
            if shard is not None:
                parameter.ds_tensor.data[: shard.length].copy_(shard.tensor)
        else:
            whole = gather_whole(_shard(parameter, None), parameter.shape, parameter.device)
            parameter.data.copy_(whole)
    persistent = [p for p in engine.module.parameters() if getattr(p, "ds_persist", False)]
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def gather_whole(shard: Shard | None, shape: torch.Size, device: torch.device) -> Tensor:
    """The whole fp32 tensor of which each rank holds a disjoint shard. Collective: every rank must call."""
    whole = torch.zeros(shape, dtype=torch.float32, device=device)
    if shard is not None:
        whole.view(-1)[shard.start : shard.start + shard.length].copy_(shard.tensor)
    dist.all_reduce(whole)
    return whole


@torch.no_grad()
def gather_state(module: nn.Module, held: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Whole fp32 tensors on the CPU of rank 0, empty elsewhere: `held` where given, else the module's own parameters.

    One parameter at a time, so that no rank holds more than one whole. Collective: every rank must call.
    held: this rank's shards; a name is held by some rank or by none.
    """
    state: dict[str, Tensor] = {}
    is_main = dist.get_rank() == 0
    names_held = set().union(*_all_gathered(sorted(held)))
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        shard = held.get(name)
        if name not in names_held:
            shard = _own_shard(parameter)
        is_replicated = name not in names_held and not hasattr(parameter, "ds_id")
        if is_replicated or _all_hold_everything(shard):
            whole = shard.tensor.float().view(shape) if shard is not None else parameter.data.float()
        else:
            whole = gather_whole(shard, shape, parameter.device)
        if is_main:
            state[name] = whole.detach().cpu().clone()
    if is_main:
        state |= {name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(module).items()}
    return state


def _all_gathered(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _all_hold_everything(shard: Shard | None) -> bool:
    """Whether every rank holds the whole tensor (stage 0), told alike on every rank."""
    return min(_all_gathered(shard is not None and shard.length == shard.numel))


def _own_shard(parameter: Any) -> Shard | None:
    """This rank's part of a parameter as the forward reads it."""
    if not hasattr(parameter, "ds_id"):
        return Shard(parameter.data.view(-1), 0, parameter.numel(), parameter.numel())
    partition = parameter.ds_tensor.ds_numel
    start = partition * dist.get_rank()
    length = min(partition, parameter.ds_numel - start)
    return Shard(parameter.ds_tensor.data[:length], start, length, parameter.ds_numel) if length > 0 else None
