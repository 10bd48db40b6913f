"""This rank's part of the fp32 state, by parameter name, the same way at every ZeRO stage.

`master_shards` and `optimizer_shards` return views into DeepSpeed's own memory: writing to a view changes the state.
After masters were written, `refresh_from_masters` brings the weights that the forward reads up to date.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amclip_ds.errors import UserError
from amclip_ds.model.init import persistent_buffers
from amclip_ds.ranks.collectives import gather_objects


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
    """The same, of the given parameters; frozen ones have no master."""
    found = {name: _shard(parameter) for name, parameter in parameters.items() if parameter.requires_grad}
    return {name: shard for name, shard in found.items() if shard is not None}


def forward_shards(parameters: Mapping[str, nn.Parameter]) -> dict[str, Shard]:
    """This rank's part of parameters as the forward reads them, in its dtype: whole, unless ZeRO-3 shards them."""
    found = {name: _own_shard(parameter) for name, parameter in parameters.items()}
    return {name: shard for name, shard in found.items() if shard is not None}


def optimizer_shards(engine: Any, to_fill: bool = False) -> dict[str, dict[str, Shard]]:
    """This rank's optimizer moments: name -> state key (exp_avg, ...) -> Shard aligned with the master's.

    Empty before the first step or `create_optimizer_state`. Stage 0: each parameter's own states, whole. to_fill: all
    that must be written by a load: where Muon keeps whole matrices on several ranks, whole on each.
    """
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    offsets = _muon_offsets(engine)
    found = {name: _moments(engine, p, offsets, to_fill) for name, p in trained.items() if _shard(p) is not None}
    return {name: moments for name, moments in found.items() if moments}


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's wrapping."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@torch.no_grad()
def create_optimizer_state(engine: Any) -> None:
    """Makes the optimizer's state by its own first step, on gradients of zero at a learning rate of zero.

    For a load, which then overwrites masters, moments and counters. Nothing happens where the state exists.
    """
    base, zero = base_optimizer(engine), engine.optimizer
    groups = base.param_groups
    if hasattr(zero, "params_in_partition"):  # Muon's buffers are made beside its step; at stage 3 they are there
        for number, group in enumerate(groups):
            if group["use_muon"]:
                zero._muon_momentum_buffer(zero.params_in_partition[number], number, zero.dtype, zero.device)
    for group, flats in zip(groups, _flat_masters(engine), strict=True):
        for flat in flats:
            if base.state.get(flat):
                continue
            kept, flat.grad = flat.grad, torch.zeros_like(flat)
            base.param_groups = [group | {"params": [flat], "lr": 0.0, "weight_decay": 0.0}]
            base.step()
            flat.grad = kept
    base.param_groups = groups


def optimizer_counters(engine: Any) -> dict[str, float]:
    """The numbers beside the moments (`step`), the same for every parameter. Raises RuntimeError where they differ."""
    found: dict[str, float] = {}
    for state in base_optimizer(engine).state.values():
        for key, value in state.items():
            if not isinstance(value, int | float) and not (torch.is_tensor(value) and value.dim() == 0):
                continue
            if found.setdefault(key, float(value)) != float(value):
                raise RuntimeError(f"the optimizer's {key} differs between parameters: {found[key]}, {float(value)}")
    return found


def set_optimizer_counters(engine: Any, counters: Mapping[str, float]) -> None:
    """Writes what `optimizer_counters` read. Raises UserError where a counter that this optimizer has is not there."""
    missing = optimizer_counters(engine).keys() - counters.keys()
    if missing:
        raise UserError(f"the checkpoint is of another optimizer: its trainer.json has no {sorted(missing)[0]}")
    for state in base_optimizer(engine).state.values():
        for key in counters.keys() & state.keys():
            if torch.is_tensor(state[key]):
                state[key].fill_(counters[key])
            else:
                state[key] = type(state[key])(counters[key])


def _flat_masters(engine: Any) -> list[list[Tensor]]:
    """For each parameter group, the tensors that the optimizer steps on."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        flats: list[list[Tensor]] = [[] for _ in zero.optimizer.param_groups]
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            flats[zero.sub_group_to_group_id[index]].append(flat)
        return flats
    return [list(group["params"]) for group in base_optimizer(engine).param_groups]


def _muon_offsets(engine: Any) -> dict[int, int]:
    """At stages 1 and 2: id of a Muon parameter -> where its matrix begins in its group's momentum buffer, which holds
    all matrices that this rank's part of the masters touches, whole, one after another."""
    zero, found = engine.optimizer, dict[int, int]()
    for number, group in enumerate(base_optimizer(engine).param_groups):
        if group["use_muon"] and hasattr(zero, "params_in_partition"):
            sizes = [parameter.numel() for parameter in zero.params_in_partition[number]]
            starts = itertools.accumulate(sizes, initial=0)
            found |= {id(p): start for p, start in zip(zero.params_in_partition[number], starts)}
    return found


def _moments(engine: Any, parameter: Any, muon_offsets: Mapping[int, int], to_fill: bool) -> dict[str, Shard]:
    """State key -> Shard, read from torch's state itself: DeepSpeed links only the first parameter group's at stages 1
    and 2 (lazy_init_hp_params_optimizer_state runs once, after the first group's step)."""
    states, zero = base_optimizer(engine).state, engine.optimizer
    if hasattr(parameter, "ds_id"):
        flat = zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(parameter)][0]]
        keys = [key for key, value in states.get(flat, {}).items() if torch.is_tensor(value) and value.dim() > 0]
        return {key: shard for key in keys if (shard := _stage_3_shard(parameter, key)) is not None}
    if not hasattr(parameter, "_hp_mapping"):
        whole = {key: value for key, value in states.get(parameter, {}).items() if torch.is_tensor(value)}
        return {k: Shard(v.view(-1), 0, v.numel(), v.numel()) for k, v in whole.items() if v.dim() > 0}
    mapping, numel = parameter._hp_mapping, parameter.numel()
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    held, place = mapping.hp_fragment_address, mapping.lp_fragment_address
    state = {key: value for key, value in states.get(flat, {}).items() if torch.is_tensor(value) and value.dim() > 0}
    if id(parameter) in muon_offsets:
        start, length = (0, numel) if to_fill else (place.start, place.numel)
        begin = muon_offsets[id(parameter)] + start
        return {key: Shard(value.narrow(0, begin, length), start, length, numel) for key, value in state.items()}
    return {
        key: Shard(v.narrow(0, held.start, held.numel), place.start, place.numel, numel) for key, v in state.items()
    }


def _shard(parameter: Any) -> Shard | None:
    if hasattr(parameter, "ds_id"):
        return _stage_3_shard(parameter, None)
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.lp_fragment_address
        return Shard(mapping.get_hp_fragment(), address.start, address.numel, parameter.numel())
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
            whole = gather_whole(_shard(parameter), parameter.shape, parameter.device)
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
    names_held = set().union(*gather_objects(sorted(held)))
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


def _all_hold_everything(shard: Shard | None) -> bool:
    """Whether every rank holds the whole tensor (stage 0), the same on every rank."""
    return min(gather_objects(shard is not None and shard.length == shard.numel))


def _own_shard(parameter: Any) -> Shard | None:
    """This rank's part of a parameter as the forward reads it."""
    if not hasattr(parameter, "ds_id"):
        return Shard(parameter.data.view(-1), 0, parameter.numel(), parameter.numel())
    partition = parameter.ds_tensor.ds_numel
    start = partition * dist.get_rank()
    length = min(partition, parameter.ds_numel - start)
    return Shard(parameter.ds_tensor.data[:length], start, length, parameter.ds_numel) if length > 0 else None
