"""Gradients at ZeRO 1 as one flat fp32 tensor a parameter group: copied in one call, summed in pieces, one norm, and a
step that the device has in hand before the host knows that norm.

DeepSpeed handles each gradient alone: two copies, a conversion to double and a norm for each of hundreds, which keep
the host busy (docs/results/gpu-step.md). Its step accepts a group of gradients that is flat already (`flat_partition`,
made for DeepCompile), so that only the way there is ours. Averages stay fp32 all the way to the optimizer; DeepSpeed's
are rounded to the gradient's dtype in between.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from amclip_ds.host_copies import begin_download
from amclip_ds.ranks.collectives import reduce_scatter
from amclip_ds.ranks.communication_time import COMMUNICATION

CLIP_EPSILON = 1e-6  # that DeepSpeed adds to a norm
ROW = 8192  # elements of which a norm is taken at a time: fp32 sums of so few lose nothing that shows


class Piece(NamedTuple):
    """A run of elements of a gradient, and where in the buffer of a collective it goes."""

    gradient: int
    start: int
    place: int
    length: int


@dataclass
class Round:
    """One collective: every rank's part of the group from `start`, `length` elements for each of them."""

    start: int
    length: int
    pieces: list[Piece]


class FlatGradients:
    """Takes over, in DeepSpeed's ZeRO-1 optimizer, the way from the parameters' gradients to its flat ones.

    Collective throughout: every rank must call what DeepSpeed calls.
    """

    def __init__(self, optimizer: Any) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup, all_gather_dp_groups

        self._optimizer, self._group_of, self._gather = optimizer, GradPartitionBufferGroup, all_gather_dp_groups
        self._rounds = [self._plan(number) for number in range(len(optimizer.bit16_groups))]
        optimizer.reduce_gradients = self.reduce
        optimizer.scaled_global_norm = self.norm
        if is_skipped_on_the_device(optimizer.optimizer):
            optimizer.step = self.step
        optimizer._update_model_bit16_weights = lambda group: None  # points each weight at where it is already

    def _plan(self, number: int) -> list[Round]:
        """Cuts a group's flat layout into rounds of at most reduce_bucket_size elements over all ranks."""
        zero, world = self._optimizer, dist.get_world_size()
        own = int(zero.partition_size[number])
        step = own if world == 1 else max(1, min(own, int(zero.reduce_bucket_size) // world))
        sizes = [parameter.numel() for parameter in zero.round_robin_bit16_groups[number]]
        offsets = zero.round_robin_bit16_offsets[number]
        rounds = [Round(start, min(step, own - start), []) for start in range(0, own, step)]
        for turn in rounds:
            for rank in range(world):
                first = rank * own + turn.start
                # Only the tensors that are there: all of them for each rank would take seconds on hundreds of ranks.
                touched = range(bisect_right(offsets, first) - 1, bisect_left(offsets, first + turn.length))
                for item in touched:
                    begin, end = max(offsets[item], first), min(offsets[item] + sizes[item], first + turn.length)
                    if begin < end:
                        place = rank * turn.length + begin - first
                        turn.pieces.append(Piece(item, begin - offsets[item], place, end - begin))
        return rounds

    @torch.no_grad()
    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Moves the parameters' gradients into this rank's part of their fp32 average over the ranks.

        A parameter without a gradient counts as one of zeros.
        """
        zero = self._optimizer
        for number, rounds in enumerate(self._rounds):
            parameters = zero.round_robin_bit16_groups[number]
            gradients = [None if p.grad is None else p.grad.reshape(-1) for p in parameters]
            flat = torch.empty(int(zero.partition_size[number]), dtype=torch.float32, device=parameters[0].device)
            for turn in rounds:
                self._sum(flat.narrow(0, turn.start, turn.length), turn, gradients)
            for parameter in parameters:
                parameter.grad = None
            world = dist.get_world_size()
            if world > 1:
                flat.div_(world)
            zero.averaged_gradients[number] = self._group_of([flat], flat)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """DeepSpeed's step of the optimizer, which waits for the norm last instead of first.

        Whether the gradient is finite is decided on the device, by the optimizer's own kernel (`found_inf`, torch's way
        for scaled losses): where it is not, weights, moments and counts stay. Meanwhile the device has the update to
        do, so that it never waits for the host to begin it.
        """
        zero = self._optimizer
        norm = self.norm()
        arrived = begin_download(norm)
        shrinks = 1.0 / ((norm + CLIP_EPSILON) / zero.clip_grad).clamp(min=1.0) if zero.clip_grad > 0 else None
        for number, master in enumerate(zero.single_partition_of_fp32_groups):
            master.grad = zero.averaged_gradients[number].flat_partition
            zero.averaged_gradients[number] = None
            if shrinks is not None:
                master.grad.mul_(shrinks)
        zero.optimizer.found_inf = norm.isfinite().logical_not().float()
        zero.optimizer.step()
        for number, master in enumerate(zero.single_partition_of_fp32_groups):
            master.grad = None
            own = dist.get_rank(group=zero.real_dp_process_group[number])
            zero.parallel_partitioned_bit16_groups[number][own].copy_(master)
        self._gather(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )
        known = arrived().cpu()
        zero.overflow = not bool(known.isfinite())
        zero._global_grad_norm = math.inf if zero.overflow else known

    def _sum(self, own: Tensor, turn: Round, gradients: list[Tensor | None]) -> None:
        """own <- this rank's part of the sum over the ranks of one round."""
        if dist.get_world_size() == 1:
            fill(own, turn, gradients)
            return
        sent = torch.empty(turn.length * dist.get_world_size(), dtype=self._sent_dtype(), device=own.device)
        fill(sent, turn, gradients)
        received = own if own.dtype == sent.dtype else torch.empty_like(own, dtype=sent.dtype)
        reduce_scatter(received, sent)
        if received is not own:
            own.copy_(received)

    def _sent_dtype(self) -> torch.dtype:
        return self._optimizer.communication_data_type or torch.float32

    @torch.no_grad()
    def norm(self, norm_type: int = 2) -> Tensor:
        """Of the whole averaged gradient, on the device. NaN or infinite where any gradient is, on all ranks."""
        squares = [norm_of(group.flat_partition).square() for group in self._optimizer.averaged_gradients.values()]
        total = torch.stack(squares).sum()
        if dist.get_world_size() > 1:
            with COMMUNICATION.waiting():
                dist.all_reduce(total)
        return total.sqrt().float()


def is_skipped_on_the_device(optimizer: Any) -> bool:
    """Whether a torch optimizer leaves everything as it is where its found_inf is 1: the fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def fill(buffer: Tensor, turn: Round, gradients: list[Tensor | None]) -> None:
    """Copies the pieces of a round into a buffer in one call; zeros where there is none, and between them."""
    cuts: list[tuple[int, Tensor | None]] = []  # of the buffer, in order: a length and what is copied there
    end = 0
    for piece in turn.pieces:
        gradient = gradients[piece.gradient]
        if gradient is None:
            continue
        if piece.place > end:
            cuts.append((piece.place - end, None))
        is_whole = piece.length == gradient.numel()
        cuts.append((piece.length, gradient if is_whole else gradient.narrow(0, piece.start, piece.length)))
        end = piece.place + piece.length
    cuts.append((buffer.numel() - end, None))
    targets, sources = [], []
    for part, (_, source) in zip(buffer.split([length for length, _ in cuts]), cuts):
        if source is None:
            part.zero_()
        else:
            targets.append(part)
            sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)


def norm_of(flat: Tensor) -> Tensor:
    """The 2-norm of a flat fp32 tensor, in double from rows of ROW elements on: no copy of it in double is made."""
    rows = flat.numel() // ROW
    norms = torch.linalg.vector_norm(flat[: rows * ROW].view(rows, ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[rows * ROW :])
    return torch.linalg.vector_norm(torch.cat([norms, rest[None]]).double())
