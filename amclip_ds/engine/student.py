"""The trained engine: one DeepSpeed engine around AClip, at ZeRO stages 0 to 3, fp32 or bf16."""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amclip_ds.comm import Comm
from amclip_ds.data import photometric
from amclip_ds.engine import fp8, shards
from amclip_ds.engine.compile import compile_changes, compile_function, compile_towers
from amclip_ds.engine.ds_config import (
    FP8_ALL,
    NO_COMPILE,
    NO_FP8,
    EngineConfig,
    check_fp8,
    check_optimizer,
    compile_mode_of,
    fetches_weights,
    is_flat,
    is_offloaded,
    read_ds_config,
    stage_of,
)
from amclip_ds.engine.flat_gradients import CLIP_EPSILON, FlatGradients
from amclip_ds.engine.light_imports import import_muon_uncompiled
from amclip_ds.engine.muon import NormBeforeMuon, build_muon, eager_kernels, with_muon
from amclip_ds.engine.offload import build_cpu_adam
from amclip_ds.engine.zero3 import (
    fetch_blocks_whole,
    forget_modules,
    gather_what_is_written,
    gradients_by_parameter,
    keep_weights_in_place,
    take_one_norm,
    with_weights_in_place,
)
from amclip_ds.errors import Preempted
from amclip_ds.model import scoring
from amclip_ds.model.amclip import AClip
from amclip_ds.model.config import ModelConfig
from amclip_ds.model.features import Encoded, Losses, StudentInputs, Targets, Terms, ViewGroup
from amclip_ds.model.init import Start, init_tensor, init_tensors, initialise, persistent_buffers
from amclip_ds.model.savings import Savings
from amclip_ds.objectives import Chosen, builder, start_of
from amclip_ds.objectives.base import start_of as start_share
from amclip_ds.optim import OptimConfig, build_optimizer, parameter_groups
from amclip_ds.ranks.communication_time import COMMUNICATION
from amclip_ds.ranks.runtime import Runtime

LOGIT_SCALE_RANGE = (0.0, math.log(100.0))


@dataclass(frozen=True)
class StepOutcome:
    """What a step did; the same on all ranks."""

    applied: bool
    grad_norm: float | Tensor
    """on the device until somebody reads it"""


SKIPPED = StepOutcome(applied=False, grad_norm=math.nan)


class StudentEngine:
    """AClip under DeepSpeed. Collective throughout: every rank must call everything."""

    def __init__(
        self,
        model: ModelConfig,
        objectives: Chosen,
        optim: OptimConfig,
        engine: EngineConfig,
        *,
        seed: int,
        runtime: Runtime,
    ) -> None:
        import deepspeed

        ds = read_ds_config(engine)
        self.stage = stage_of(ds)
        check_optimizer(ds, engine.deepspeed, optim.name)
        check_fp8(ds, engine)
        self.fp8 = engine.fp8
        if self.fp8 != NO_FP8:
            fp8.check_machine(runtime.device)
        if optim.name == "muon":
            ds = with_muon(ds)
        self.fetches_weights = fetches_weights(ds, runtime.world_size)
        if self.stage == 3 and not self.fetches_weights:
            ds = with_weights_in_place(ds)
        self.dtype = torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32
        self.ds_config = ds | {
            "train_micro_batch_size_per_gpu": 1,  # the batch is ours: one backward, or GradCache's, is one step
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_grad_norm,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False}},  # on, it waits for the whole device twice a step
        }
        if self.dtype == torch.bfloat16:  # without it, stages 1 and 2 would apply a gradient that is not finite
            self.ds_config["bf16"] = ds["bf16"] | {"check_grad_overflow": True}
        flattens = is_flat(ds, engine, optim.name)
        if flattens:  # with it DeepSpeed would copy each gradient into a buffer of its own first
            self.ds_config["zero_optimization"] = ds["zero_optimization"] | {"contiguous_gradients": False}
        self.clip = optim.clip_grad_norm
        self.savings = savings_of(engine, self.stage, runtime.world_size)
        with build_context(self.stage, self.ds_config):
            module = AClip(model, builder(objectives), self.savings)
        self.start = start_of(seed, model, objectives)
        first: dict[str, shards.Shard] = {}
        start_weights(module, self.start, self.stage, first if self.dtype == torch.bfloat16 else None)
        if self.fetches_weights:
            fetch_blocks_whole(module)
        self.in_fp8 = fp8.convert_towers(module, with_text=True) if self.fp8 == FP8_ALL else ""
        self.compile_asked = str(engine.compile)
        self.compile_mode = compile_mode_of(self.compile_asked, self.stage, runtime.device.type, self.fetches_weights)
        self.not_compiled = compile_towers(module, self.compile_mode)
        mode = NO_COMPILE if self.not_compiled else self.compile_mode
        self.change_views = compile_changes(mode, runtime.device)
        photometric.constants(runtime.device)  # a compiler takes them as they are
        self.normalise = compile_function(mode, photometric.normalise)
        self.scores_to_views = compile_function(mode, scoring.scores_to_views)
        starts = {name: start_share(options) for name, options in objectives.items()}
        groups = parameter_groups(module.named_parameters(), optim, starts)
        self.in_host_memory = in_host_memory = is_offloaded(ds, "offload_optimizer")
        optimizer: torch.optim.Optimizer
        if in_host_memory:
            optimizer = build_cpu_adam(groups, optim, engine.deepspeed, runtime)
        elif optim.name == "muon":
            optimizer = build_muon(groups, optim)
        else:
            optimizer = build_optimizer(groups, optim)
        import_muon_uncompiled()
        with gradients_by_parameter() if self.stage == 3 else contextlib.nullcontext():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self.ds_config, dist_init_required=False
            )
        self.engine.stage_number = self.stage
        self._scale: dict[str, shards.Shard] | None = None
        self.flat = FlatGradients(self.engine.optimizer) if flattens else None
        if self.stage in (1, 2) and not in_host_memory:
            skip_overflow_scan(self.engine.optimizer)
        self._muon_is_eager = optim.name == "muon" and self.compile_mode == NO_COMPILE
        self._muon_norm = NormBeforeMuon(self.engine.optimizer) if optim.name == "muon" and self.stage else None
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
        exact_buffers(module, self.start)
        init_fp32_masters(self.engine, first)
        if self.stage == 3:
            gather_with_the_model(module)
            take_one_norm(self.engine.optimizer)
            if self.fetches_weights:
                gather_what_is_written(self.engine)
            else:
                keep_weights_in_place(self.engine.optimizer)

    @property
    def module(self) -> nn.Module:
        """The AClip inside."""
        return self.engine.module

    def __enter__(self) -> "StudentEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Takes DeepSpeed's hooks away, which hold an engine and its memory for good in a program that outlives its
        training. Not after an error: the device may wait for ranks that are gone, and this waits for the device."""
        if kind is None or issubclass(kind, Preempted):
            with contextlib.suppress(Exception):  # the run has ended well
                self.engine.destroy()
                forget_modules()

    def encode(self, inputs: StudentInputs, targets: Targets) -> Encoded:
        """AClip.encode through the engine."""
        return self.engine(AClip.encode, inputs, targets)

    def losses(
        self,
        cls: Tensor,
        eot: dict[str, Tensor],
        targets: Targets,
        sample_terms: Terms,
        sample_loss: Tensor | None,
        comm: Comm,
        progress: float,
    ) -> Losses:
        """AClip.losses through the engine."""
        return self.engine(AClip.losses, cls, eot, targets, sample_terms, sample_loss, comm, progress)

    def encode_and_losses(
        self, inputs: StudentInputs, targets: Targets, comm: Comm
    ) -> tuple[Losses, tuple[Tensor | None, ...]]:
        """AClip.encode_and_losses through the engine: a graph that spans two of its forwards is not to be had."""
        return self.engine(AClip.encode_and_losses, inputs, targets, comm)

    def choose(self, group: ViewGroup) -> Tensor | None:
        """AClip.choose through the engine."""
        return self.engine(AClip.choose, group)

    def embed_images(self, images: Tensor) -> Tensor:
        """AClip.embed_images through the engine."""
        return self.engine(AClip.embed_images, images)

    def embed_texts(self, token_ids: Tensor) -> Tensor:
        """AClip.embed_texts through the engine."""
        return self.engine(AClip.embed_texts, token_ids)

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's loss, averaged over the ranks."""
        with eager_kernels(self._muon_is_eager):
            self.engine.backward(loss)

    @contextlib.contextmanager
    def accumulate_gradients(self) -> Iterator[None]:
        """Inside, many backward calls make one gradient (GradCache), which is reduced over the ranks at the end."""
        if self.stage > 0 and self.flat is None:
            with eager_kernels(self._muon_is_eager), self.engine.coalesce_grad_reduction():
                yield
            return
        with self.engine.no_sync():
            yield
        self.engine.allreduce_gradients()

    def set_lr(self, lr: float, progress: float = 1.0) -> None:
        """Sets each group's learning rate to lr times its lr_scale; 0 for what begins later, which then does not decay.

        progress: how much of the run is done, 0 to 1.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0) if progress >= group.get("start", 0.0) else 0.0

    def step(self) -> StepOutcome:
        """One optimizer step, unless the gradient is not finite: then nothing changes, on all ranks."""
        with eager_kernels(self._muon_is_eager):
            if self.stage == 0:
                return self._step_at_stage_0()
            self.engine.step()
        norm = self._muon_norm.norm() if self._muon_norm else self.engine.get_global_grad_norm()
        return StepOutcome(bool(self.engine.was_step_applied()), math.nan if norm is None else norm)

    def _step_at_stage_0(self) -> StepOutcome:
        """DeepSpeed applies a NaN gradient at stage 0: the finite check is ours (gradients are already all-reduced)."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if dist.is_initialized():
            dist.all_reduce(norm, dist.ReduceOp.MAX)  # NaN may win or lose a MAX: agree on finiteness too
        finite = torch.isfinite(norm).to(torch.int32)
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if not finite.item():
            self.engine.zero_grad()
            self.engine.optimizer.zero_grad()
            return StepOutcome(False, norm)
        self.engine.step()
        return StepOutcome(True, norm)

    @torch.no_grad()
    def commit(self, comm: Comm, progress: float = 1.0) -> None:
        """What the objectives that have begun do after an applied step. Collective."""
        for objective in self.module.objectives.values():  # type: ignore[operator,union-attr]
            if objective.is_on(progress):
                objective.commit(comm)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamps the fp32 master of logit_scale, and the copy the forward reads, to [0, ln 100]."""
        parameter: Any = self.module.logit_scale
        if self._scale is None or self.in_host_memory:  # at stage 3 each question waits for communication
            self._scale = shards.master_shards_of({"logit_scale": parameter})
        for shard in self._scale.values():
            shard.tensor.clamp_(*LOGIT_SCALE_RANGE)
        parameter.data.clamp_(*LOGIT_SCALE_RANGE)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data.clamp_(*LOGIT_SCALE_RANGE)

    def logit_scale(self) -> float:
        """exp(logit_scale), as the forward reads it."""
        parameter: Any = self.module.logit_scale
        with gathered([parameter]) if self.fetches_weights else contextlib.nullcontext():
            return float(parameter.detach().float().exp().item())

    def full_state(self) -> dict[str, Tensor]:
        """Whole fp32 masters, frozen parameters and buffers on the CPU of rank 0; empty on the others."""
        return shards.gather_state(self.module, shards.master_shards(self.engine))


def savings_of(engine: EngineConfig, stage: int, world_size: int) -> Savings:
    """The savings that hold here. At ZeRO-3 each pass through a layer is a collective, and how many groups texts make
    by their length depends on a rank's own: there they are taken together."""
    if stage == 3 and world_size > 1:
        return replace(engine.savings, texts_by_length=False)
    return engine.savings


def skip_overflow_scan(optimizer: Any) -> None:
    """Leaves DeepSpeed's look for a gradient that is not finite to the norm, which it takes right after (stages 1, 2).

    A NaN or an infinity anywhere makes the norm one, on all ranks, and the step is skipped alike; looking at every
    parameter first, eight kernels and more for each, took a sixth of a step of ViT-B (docs/results/gpu-step.md).
    A group's norm is taken by one call for all of its tensors (`norm_of_group`). The norm is read from the device once:
    DeepSpeed asks for it again for each group, which would wait for the last one's update. Where it is within the bound
    the gradients, which would be multiplied by 1, are left alone.
    """
    assert optimizer.compute_grad_norm
    take, clip = optimizer.scaled_global_norm, optimizer.unscale_and_clip_grads
    optimizer.has_overflow = lambda partition_gradients=True: False
    optimizer.get_grad_norm_direct = functools.partial(norm_of_group, optimizer.device)
    optimizer.scaled_global_norm = lambda norm_type=2: take(norm_type).cpu()
    optimizer.unscale_and_clip_grads = lambda groups, norm: (
        None if float(norm) + CLIP_EPSILON <= optimizer.clip_grad else clip(groups, norm)
    )


def norm_of_group(device: str, gradients: list[Tensor], params: list[nn.Parameter]) -> Tensor:
    """Over all ranks, fp32; -1 where it is not finite, as DeepSpeed has it. Collective: every rank must call.

    DeepSpeed's numbers: each tensor's norm and their sum in fp64. On a GPU the order of an fp64 sum is another one,
    which fp32 does not show. gradients: may end with what fills this rank's part up.
    """
    filled = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    own = [gradient for gradient, _ in zip(filled, params)]
    norms = torch._foreach_norm(own, 2, dtype=torch.float64) if own else []
    total = torch.stack(list(norms)).square().sum().float() if norms else torch.zeros((), device=device)
    if dist.get_world_size() > 1:
        with COMMUNICATION.waiting():
            dist.all_reduce(total)
    norm = total.sqrt()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))


def build_context(stage: int, ds_config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """zero.Init at stage 3, so that no rank ever holds the whole model; nothing below it."""
    if stage < 3:
        return contextlib.nullcontext()
    import deepspeed
    import timm  # noqa: F401  # under Init, torch.tensor is another: what timm imports could not be loaded there

    return deepspeed.zero.Init(config_dict_or_path=ds_config)


@torch.no_grad()
def start_weights(module: nn.Module, start: Start, stage: int, first: dict[str, shards.Shard] | None = None) -> None:
    """Our keyed initialisation; at stage 3 each rank fills its own shard, a few parameters in memory at a time.

    first: takes what this rank fills in fp32; below stage 3 the module's own memory, which an engine in bf16 leaves.
    """
    if stage < 3:
        initialise(module, start)
        if first is not None:
            first |= shards.forward_shards(dict(module.named_parameters()))
        return
    named: dict[str, Any] = dict(module.named_parameters())  # ZeRO-3 gives them ds_* attributes
    for name, whole in init_tensors({name: parameter.ds_shape for name, parameter in named.items()}, start):
        part = fill_shard(named[name], whole)
        if first is not None:
            first[name] = replace(part, tensor=part.tensor.clone())
    for name, buffer in persistent_buffers(module).items():
        value = init_tensor(name, buffer.shape, start)
        buffer.data = value.to(buffer.device)


def fill_shard(parameter: Any, whole: Tensor) -> shards.Shard:
    """Writes this rank's part of a whole tensor into a ZeRO-3 parameter. Returns that part."""
    shard = parameter.ds_tensor
    start = shard.ds_numel * dist.get_rank()
    part = whole.reshape(-1)[start : start + shard.ds_numel]
    shard.data[: part.numel()].copy_(part)
    shard.data[part.numel() :].zero_()
    return shards.Shard(part, start, part.numel(), whole.numel())


@torch.no_grad()
def init_fp32_masters(engine: Any, first: dict[str, shards.Shard]) -> None:
    """Gives bf16 engines masters with the full fp32 start instead of its bf16 rounding. first: what start_weights took,
    which is let go of; nothing for an engine in fp32."""
    for name, shard in shards.master_shards(engine).items() if first else ():
        held = first[name]
        shard.tensor.copy_(held.tensor[shard.start - held.start :][: shard.length])
    first.clear()


@torch.no_grad()
def exact_buffers(module: nn.Module, start: Start) -> None:
    """Gives buffers that an engine made bf16 their full fp32 start again."""
    for name, buffer in persistent_buffers(module).items():
        buffer.copy_(init_tensor(name, buffer.shape, start))


def gather_with_the_model(module: AClip) -> None:
    """At ZeRO-3: an objective's own parameters are there whenever the model runs, not in its forward alone."""
    import deepspeed

    for objective in module.objectives.values():
        for parameter in objective.parameters(recurse=False):
            deepspeed.zero.register_external_parameter(module, parameter)


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """ZeRO-3 parameters whole for reading."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
