"""Muon at every ZeRO stage: DeepSpeed's own, which orthogonalises whole matrices before their updates are cut up.

At stage 0 its step does it; at 1 and 2 the laying out of gradients after a backward pass, by each rank for the matrices
that its part of the masters touches; at 3 the step, each rank a share of the matrices. Whatever it finds afterwards in
place of gradients are updates: the gradient's norm is taken before (`NormBeforeMuon`).
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amclip_ds.engine.ds_config import stage_of
from amclip_ds.optim import OptimConfig


def with_muon(ds: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as Muon needs it: at stage 3 whole gradients, where a rank is else sent its part alone."""
    if stage_of(ds) < 3:
        return ds
    return ds | {"zero_optimization": ds["zero_optimization"] | {"reduce_scatter": False}}


def build_muon(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Muon for the groups of parameter_groups that say so, AdamW for the others."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group |= (
            {"momentum": config.momentum} if group["use_muon"] else {"betas": tuple(config.betas), "eps": config.eps}
        )
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    adamw = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "fused": True}
    return MuonWithAuxAdam(groups, torch.optim.AdamW, adamw)


def eager_kernels(is_eager: bool) -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed compiles Muon's kernels, where a run need have no compiler: inside, they run as they are written."""
    return torch.compiler.set_stance("force_eager") if is_eager else contextlib.nullcontext()


class NormBeforeMuon:
    """The gradient's norm at stages 1 to 3, where DeepSpeed's own is of what the gradients have become by then."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._squares: dict[int, Tensor] = {}
        self._norm: float | Tensor = float("nan")
        if hasattr(optimizer, "_apply_muon_to_accumulated_grads"):  # stage 3
            self._then = optimizer._apply_muon_to_accumulated_grads
            optimizer._apply_muon_to_accumulated_grads = self._at_stage_3
        else:
            self._then = optimizer.get_flat_partition
            optimizer.get_flat_partition = self._at_stages_1_and_2

    def norm(self) -> float | Tensor:
        """Of the step that was taken, over all ranks; NaN where there was none. Collective: every rank must call."""
        if self._squares:
            total = torch.stack(list(self._squares.values())).sum()
            dist.all_reduce(total)
            self._norm = total.sqrt()
        found, self._norm = self._norm, float("nan")
        return found

    def _at_stages_1_and_2(self, tensors: list[Tensor], *args: Any, param_group_idx: int, **words: Any) -> Any:
        """Notes the sum of squares of this rank's elements of a group, before they are laid out."""
        zero, rank, pieces = self._optimizer, dist.get_rank(), []
        for tensor, gradient in zip(tensors, zero.all_grad_tensors[param_group_idx]):
            number = zero.get_param_id(tensor)
            start = zero.grad_start_offset[param_group_idx][rank][number]
            room = (
                zero.partition_size[param_group_idx]
                - zero.grad_partition_insertion_offset[param_group_idx][rank][number]
            )
            pieces.append(gradient.reshape(-1)[int(start) : int(start + room)])
        norms = torch._foreach_norm(pieces, 2, dtype=torch.float64) if pieces else []
        none = torch.zeros((), dtype=torch.float64, device=zero.device)
        self._squares[param_group_idx] = torch.stack([none, *norms]).square().sum()
        return self._then(tensors, *args, param_group_idx=param_group_idx, **words)

    def _at_stage_3(self) -> None:
        """Leaves the norm at NaN where DeepSpeed skips the step before it comes here."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._norm = combine_grad_norm_groups(self._optimizer._get_norm_groups())
        self._then()
