"""Where the teacher's copy for the forward is: replicated on every rank, or sharded by ZeRO-3; and its publishing.

The average itself is fp32 and sharded like the student's masters (teacher.py); what is published is in the student's
compute dtype. Everything here is collective: every rank must call.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amclip_ds.engine import fp8
from amclip_ds.engine.compile import compile_towers
from amclip_ds.engine.ds_config import NO_FP8, compile_mode_of, is_teacher_sharded
from amclip_ds.engine.shards import Shard
from amclip_ds.engine.student import StudentEngine, build_context, exact_buffers, start_weights
from amclip_ds.engine.zero3 import fetch_blocks_whole, gather_what_is_written
from amclip_ds.errors import UserError
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.init import persistent_buffers
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import Chosen, builder
from amclip_ds.ranks.collectives import gather_flat, gather_objects

Layout = list[tuple[str, int, int]]
"""What a rank holds: (name, start, length), in the order it sends them."""


class Replicated:
    """The whole teacher on every rank, refreshed by one coalesced all-gather (stage 0: by a copy)."""

    is_sharded = False

    def __init__(self, model: ModelConfig, objectives: Chosen, student: StudentEngine, device: torch.device) -> None:
        module = TeacherModel(model, builder(objectives), student.savings)
        if student.stage < 3:
            start_as(student.module, module)
        else:
            start_weights(module, student.start, stage=0)
        self.module: nn.Module = module.to(device)
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(student.dtype)
        self.in_fp8 = fp8.convert_towers(self.module, with_text=False) if student.fp8 != NO_FP8 else ""
        if not student.not_compiled:
            compile_towers(self.module, compile_mode_of(student.compile_asked, student.stage, device.type))
        self.dtype = student.dtype
        self.whole_on_every_rank = student.stage == 0 or dist.get_world_size() == 1
        self._layouts: dict[bool, list[Layout]] = {}
        self._views: dict[bool, list[Tensor]] = {}

    def __call__(self, method: Callable[..., Any], *inputs: Any) -> Any:
        """A method of TeacherModel over the inputs."""
        return self.module(method, *inputs)

    @torch.no_grad()
    def publish(self, published: Mapping[str, Shard], whole: bool = True) -> None:
        """Copies the fp32 shards of all ranks into the weights of the forward.

        whole: whether `published` is everything; the ranks' layouts are exchanged once for either.
        """
        if self.whole_on_every_rank:
            pieces = [(name, shard.start, shard.tensor) for name, shard in published.items()]
        else:
            pieces = list(self._exchange(published, whole))
        if whole not in self._views:  # a GPU waits for the host here: what stays the same is made once
            parameters = dict(self.module.named_parameters())
            self._views[whole] = [
                parameters[name].data.view(-1)[start : start + piece.numel()] for name, start, piece in pieces
            ]
        torch._foreach_copy_(self._views[whole], [piece for *_, piece in pieces])

    def _exchange(self, published: Mapping[str, Shard], whole: bool) -> Iterator[tuple[str, int, Tensor]]:
        """All ranks' pieces, by one all-gather in the dtype of the forward."""
        if whole not in self._layouts:
            mine_now = [(name, shard.start, shard.length) for name, shard in published.items()]
            self._layouts[whole] = gather_objects(mine_now)
        layouts = self._layouts[whole]
        longest = max(sum(length for *_, length in layout) for layout in layouts)
        device = next(self.module.parameters()).device
        mine = torch.empty(longest, dtype=self.dtype, device=device)  # what is beyond a rank's own nobody reads
        lengths = [shard.length for shard in published.values()]
        if lengths:  # a rank may hold nothing that is averaged
            torch._foreach_copy_(mine[: sum(lengths)].split(lengths), [shard.tensor for shard in published.values()])
        everything = mine.new_empty(len(layouts) * longest)
        gather_flat(everything, mine)
        for layout, flat in zip(layouts, everything.view(len(layouts), longest)):
            offset = 0
            for name, start, length in layout:
                yield name, start, flat[offset : offset + length]
                offset += length


class Sharded:
    """The teacher as ZeRO-3 shards that align with the student's: publishing is a copy, without communication."""

    is_sharded = True
    in_fp8 = ""

    def __init__(self, model: ModelConfig, objectives: Chosen, student: StudentEngine, device: torch.device) -> None:
        import deepspeed

        ds = {key: value for key, value in student.ds_config.items() if key != "gradient_clipping"}
        # Nothing stays gathered between two forwards: a shard that changes must be seen by the next one. What is
        # fetched ahead is used in the same forward, or let go of at the beginning of the next.
        ahead = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters")
        students = ds["zero_optimization"]
        ds["zero_optimization"] = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        } | {key: students[key] for key in ahead if key in students}
        with build_context(3, ds):
            module = TeacherModel(model, builder(objectives), student.savings)
        start_weights(module, student.start, stage=3)
        fetch_blocks_whole(module)
        if not student.not_compiled:
            mode = compile_mode_of(student.compile_asked, student.stage, device.type, fetches_weights=True)
            compile_towers(module, mode)
        self._engine, *_ = deepspeed.initialize(model=module, config=ds, dist_init_required=False)
        gather_what_is_written(self._engine)
        self.module: nn.Module = module
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
        exact_buffers(module, student.start)

    def __call__(self, method: Callable[..., Any], *inputs: Any) -> Any:
        """A method of TeacherModel over the inputs, through its engine."""
        return self._engine(method, *inputs)

    @torch.no_grad()
    def publish(self, published: Mapping[str, Shard], whole: bool = True) -> None:
        """Copies this rank's fp32 shards into its ZeRO-3 shards."""
        parameters: dict[str, Any] = dict(self.module.named_parameters())  # ZeRO-3 gives them ds_tensor, their shards
        targets = [parameters[name].ds_tensor.data[: shard.length] for name, shard in published.items()]
        torch._foreach_copy_(targets, [shard.tensor for shard in published.values()])


@torch.no_grad()
def start_as(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher the weights and statistics of a student that has not stepped: both start alike, and drawing
    them again would take seconds."""
    weights, statistics = dict(student.named_parameters()), persistent_buffers(student)
    for name, parameter in teacher.named_parameters():
        parameter.data = weights[name].detach().clone()
    for name, buffer in persistent_buffers(teacher).items():
        buffer.copy_(statistics[name])


def place_teacher(
    placement: str, model: ModelConfig, objectives: Chosen, student: StudentEngine, device: torch.device
) -> Replicated | Sharded:
    """Builds the teacher's copy where teacher.placement says. Raises UserError for what the stage cannot hold."""
    if placement == "sharded" and student.stage < 3:
        raise UserError(
            f"teacher.placement: sharded needs ZeRO stage 3, and engine.deepspeed is stage {student.stage};"
            f" use teacher.placement=auto"
        )
    is_sharded = is_teacher_sharded(placement, student.stage, dist.get_world_size())
    return (Sharded if is_sharded else Replicated)(model, objectives, student, device)
