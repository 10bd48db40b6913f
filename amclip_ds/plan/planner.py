"""The plan of a run: for each ZeRO stage memory, what fits, speed, time and cost; and which stage to take."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclip_ds import config as settings
from amclip_ds.config import TrainConfig
from amclip_ds.engine.ds_config import (
    DS_CONFIGS,
    NO_COMPILE,
    NO_FP8,
    check_fp8,
    check_optimizer,
    fetches_weights,
    is_flat,
    is_offloaded,
    read_ds_config,
    stage_of,
)
from amclip_ds.errors import UserError
from amclip_ds.plan import model_state, optimizer, work
from amclip_ds.plan.gpus import Gpu, Rate, rate_of
from amclip_ds.plan.work import Work
from amclip_ds.sizes import GIB

YFCC15M = 14_688_256  # samples of an epoch in the papers' runs: 3,586 steps of 4,096
SAVE_STALL_BYTES_PER_S = 42.7e9  # a rank's part copied into pinned memory (one H200, docs/results/saving.md)
SAVE_WRITE_BYTES_PER_S = 0.62e9  # hashed and written by one rank (docs/results/saving.md)
DECODED_PER_CORE = 384  # samples/s of 500 x 375 into three crops of 224 px (docs/results/decoding.md)
CONTEXT_GIB = 1.0  # CUDA, NCCL and cuBLAS beside torch's allocator
FRAGMENTED = 0.03  # of the peak, held by the allocator and not usable
LIVE = {"stage3_max_reuse_distance": 1e9, "stage3_prefetch_bucket_size": 5e7}  # DeepSpeed's defaults, in elements


@dataclass(frozen=True)
class Ask:
    """What a plan is made for."""

    gpus: int
    gpu: Gpu
    gpus_per_node: int
    samples: int | None = None
    """of an epoch"""
    samples_source: str = ""
    text_tokens: int | None = None
    rate: Rate | None = None
    """of --probe or --mfu; None: what was measured"""
    bandwidth: float | None = None
    """bytes a second that a GPU sends and receives in collectives; None: they are left out"""
    price: float | None = None
    """of a GPU for an hour"""
    sample_bytes: float | None = None

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)


@dataclass
class Memory:
    """Bytes on the fullest rank."""

    state: dict[str, float]
    """by part, gradients at their own peak"""
    by_part: dict[str, float]
    """what there is at the moment of the peak"""
    moment: str
    activations: float

    @property
    def peak(self) -> float:
        return sum(self.by_part.values())

    @property
    def slack(self) -> float:
        return CONTEXT_GIB * GIB + FRAGMENTED * self.peak


def memory_of(step: Work) -> Memory:
    """The peak of a training step, without allocating anything."""
    ds = read_ds_config(step.config.engine)
    state, acts = model_state.state_of(step), work.activations_of(step)
    inputs = work.input_bytes(step) | {"distill": work.frozen_bytes(step)}
    standing = {part: size for part, size in state.items() if part != "gradients"} | inputs
    buckets = _bucket_bytes(step, ds)
    is_split = step.batch.splits > 1
    moments = {
        "backward": standing
        | {
            "gradients": state["gradients"] if is_split else 0.0,  # they grow while the activations go
            "activations": acts.towers,
            "logits": acts.objectives,
            "transient": acts.transient,
            "buckets": buckets,
        },
        "step": standing
        | {
            "gradients": state["gradients"],
            "transient": _step_bytes(step, ds, state),
            "muon": _muon_bytes(step, ds),
            "buckets": buckets,
        },
        "publish": standing | {"transient": _published_bytes(step)},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    order = [
        *model_state.PARTS,
        "distill",
        "activations",
        "logits",
        "images",
        "photometric",
        "transient",
        "muon",
        "buckets",
    ]
    by_part = {part: float(moments[moment].get(part, 0.0)) for part in order}
    return Memory(state, by_part, moment, acts.towers + acts.objectives)


def _step_bytes(step: Work, ds: dict[str, Any], state: dict[str, float]) -> float:
    """Beside the gradients: their fp32 copy for the optimizer; where they are flat, that is what they become."""
    if is_offloaded(ds, "offload_optimizer") or not step.stage:
        return 0.0
    if is_flat(ds, step.config.engine, step.config.optim.name):
        return min(state["masters"], step.bytes * model_state.trained_elements(step.student))
    return state["masters"]


def _bucket_bytes(step: Work, ds: dict[str, Any]) -> float:
    """What ZeRO lays together to send it, and at stage 3 the weights gathered at a time: those that are read again
    within the reuse distance stay, so a smaller model is whole from its forward to its backward pass. One rank's shards
    are the weights."""
    zero = ds.get("zero_optimization", {})
    elements = model_state.trained_elements(step.student)
    bucket = min(float(zero.get("reduce_bucket_size", 5e8)), elements)
    sent = work.FP32 if ds.get("communication_data_type") == "fp32" else step.bytes
    if step.stage == 0:
        return 0.0
    if is_flat(ds, step.config.engine, step.config.optim.name):
        return bucket * sent if step.world > 1 else 0.0
    is_cast = step.world > 1 or step.stage == 3  # stage 3 averages on one rank too
    total = bucket * (step.bytes + (sent if is_cast else 0)) if step.stage > 1 or step.world > 1 else 0.0
    if fetches_weights(ds, step.world):
        live = sum(float(zero.get(key, default)) for key, default in LIVE.items())
        total += step.bytes * min(live, elements)
    return total


def _muon_bytes(step: Work, ds: dict[str, Any]) -> float:
    """What orthogonalising holds: at stages 1 and 2 the updates of a rank's matrices beside their gradients, at 3
    gradients and momenta of as many matrices as fill a bucket, whole, and of each round's largest twice more."""
    elements, shapes = optimizer.muon_elements(step), optimizer.muon_shapes(step)
    if not elements or step.stage == 0:
        return 0.0
    if step.stage < 3:
        return step.bytes * elements / step.world
    sent = work.FP32 if ds.get("communication_data_type") == "fp32" else step.bytes
    bucket = min(float(ds["zero_optimization"].get("reduce_bucket_size", 5e8)), elements)
    largest = max(rows * columns for rows, columns in shapes)
    return sent * (2 * bucket + (2 * largest * step.world if step.world > 1 else 0))


def _published_bytes(step: Work) -> float:
    """The teacher's all-gather at stages 1 and 2: everything, and a rank's share."""
    if step.world == 1 or step.stage not in (1, 2) or step.teacher_grid is None:
        return 0.0
    sent = sum(p.numel() for name, p in step.teacher.items() if name.startswith(("vision.", "objectives.")))
    return step.bytes * sent * (1 + 1 / step.world)


@dataclass
class StagePlan:
    """What one ZeRO stage comes to."""

    stage: int
    config: TrainConfig
    """with this stage's DeepSpeed file"""
    memory: Memory
    fits: bool
    largest_per_gpu: int | None
    """the largest batch.per_gpu that fits and divides the rank's batch; None: not even one sample"""
    tflop_per_step: float
    """of all ranks, without what runs twice"""
    executed_tflop: float
    step_s: float | None
    """None where nothing was measured, and where no step is made since it does not fit"""
    communication_s: float | None
    rate: Rate | None

    @property
    def file(self) -> str:
        """Of ds_configs, or a path."""
        return self.config.engine.deepspeed

    def json(self, plan: "Plan") -> dict[str, Any]:
        """For a program; the design's contract."""
        gib = {part: size / GIB for part, size in self.memory.by_part.items()}
        time = plan.time_of(self)
        return {
            "model_state_gib": sum(self.memory.state.values()) / GIB,
            "activations_gib": self.memory.activations / GIB,
            "peak_gib": self.memory.peak / GIB,
            "tflop_per_step": self.tflop_per_step,
            "samples_per_s": time["samples_per_s"],
            "hours": time["hours"],
            "fits": self.fits,
            "by_part": gib,
            "model_state_by_part": {part: size / GIB for part, size in self.memory.state.items()},
            "slack_gib": self.memory.slack / GIB,
            "needed_gib": (self.memory.peak + self.memory.slack) / GIB,
            "peak_at": self.memory.moment,
            "engine.deepspeed": self.file,
            "largest_per_gpu": self.largest_per_gpu,
            "step_s": self.step_s,
            "communication_s": self.communication_s,
            "mfu": time["mfu"],
            "node_hours": time["node_hours"],
            "gpu_hours": time["gpu_hours"],
            "kwh": time["kwh"],
            "cost": time["cost"],
            "speed_from": self.rate.source if self.rate else None,
        }


@dataclass
class Plan:
    """A plan for one kind of GPU."""

    ask: Ask
    config: TrainConfig
    stages: dict[int, StagePlan]
    impossible: dict[int, str]
    recommended: int | None
    settings: list[str]
    """the key=value words that the recommendation adds"""
    chosen: StagePlan
    """the recommended stage with those words, else the configured one"""
    steps: int
    samples_source: str
    notes: list[str] = field(default_factory=list)

    def time_of(self, stage: StagePlan) -> dict[str, Any]:
        """Speed, time and cost of a stage; None where it has no time of a step."""
        names = ("samples_per_s", "hours", "node_hours", "gpu_hours", "kwh", "cost", "mfu")
        if stage.step_s is None:
            return dict.fromkeys(names)
        ask = self.ask
        hours = self.steps * stage.step_s / 3600
        peak = ask.gpu.peak_tflops
        return {
            "samples_per_s": self.config.batch.global_size / stage.step_s,
            "hours": hours,
            "node_hours": hours * ask.nodes,
            "gpu_hours": hours * ask.gpus,
            "kwh": None if ask.gpu.watts is None else hours * ask.gpus * ask.gpu.watts / 1000,
            "cost": None if ask.price is None else hours * ask.gpus * ask.price,
            "mfu": None if peak is None else stage.tflop_per_step / stage.step_s / ask.gpus / peak,
        }

    def json(self) -> dict[str, Any]:
        """For a program: {"stages": {...}, "recommended": ..., "chosen": {...}, ...}."""
        ask, share = self.ask, settings.plan_batch(self.config.batch, self.ask.gpus)
        return {
            "gpu": ask.gpu.name,
            "gpus": ask.gpus,
            "gpus_per_node": ask.gpus_per_node,
            "nodes": ask.nodes,
            "gpu_memory_gib": ask.gpu.memory_gib,
            "stages": {str(number): stage.json(self) for number, stage in self.stages.items()},
            "recommended": None if self.recommended is None else str(self.recommended),
            "recommended_settings": self.settings,
            "chosen": self.chosen.json(self),
            "impossible": {str(number): reason for number, reason in self.impossible.items()},
            "batch": {
                "global": self.config.batch.global_size,
                "local": share.local,
                "micro": share.micro,
                "splits": share.splits,
            },
            "steps": self.steps,
            "samples": self.steps * self.config.batch.global_size,
            "samples_from": self.samples_source,
            "checkpoint": checkpoint_of(self),
            "data": data_rate(self),
            "learning_rate": optimizer.learning_rates(self.config),
            "notes": self.notes,
        }


def make_plan(config: TrainConfig, ask: Ask) -> Plan:
    """Plans every stage. Raises UserError for a batch that does not divide, and what cannot be built."""
    files = stage_files(config)
    stages: dict[int, StagePlan] = {}
    impossible = {}
    for number, file in files.items():
        at_stage = dataclasses.replace(config, engine=dataclasses.replace(config.engine, deepspeed=file))
        try:
            ds = read_ds_config(at_stage.engine)
            check_optimizer(ds, file, config.optim.name)
            check_fp8(ds, at_stage.engine)
        except UserError as error:
            impossible[number] = str(error)
            continue
        stages[number] = _plan_stage(at_stage, ask, number)
    steps, source = _steps(config, ask)
    recommended, per_gpu = _recommend(config, ask, stages)
    configured, words = stage_of(read_ds_config(config.engine)), []
    chosen = stages.get(configured if recommended is None else recommended, next(iter(stages.values())))
    if recommended not in (None, configured):
        words.append(f"engine.deepspeed={chosen.file}")
    if per_gpu is not None:
        words.append(f"batch.per_gpu={per_gpu}")
        split = dataclasses.replace(chosen.config, batch=dataclasses.replace(config.batch, per_gpu=per_gpu))
        chosen = _plan_stage(split, ask, chosen.stage)
    plan = Plan(ask, config, stages, impossible, recommended, words, chosen, steps, source)
    plan.notes = _notes(plan)
    return plan


def stage_files(config: TrainConfig) -> dict[int, str]:
    """The DeepSpeed file of each stage: the configured one, and its like of the other stages."""
    ds = read_ds_config(config.engine)
    precision = "bf16" if ds.get("bf16", {}).get("enabled") else "fp32"
    offload = "_offload" if is_offloaded(ds, "offload_optimizer") else ""
    files = {0: "zero0_fp32.json"}
    for stage in (1, 2, 3):
        with_offload = f"zero{stage}_{precision}{offload}.json"
        files[stage] = with_offload if (DS_CONFIGS / with_offload).is_file() else f"zero{stage}_{precision}.json"
    return files | {stage_of(ds): config.engine.deepspeed}


def _plan_stage(config: TrainConfig, ask: Ask, number: int) -> StagePlan:
    step = work.work_of(config, ask.gpus, ask.text_tokens)
    memory = memory_of(step)
    flops = work.flops_of(step)
    rate = _rate(ask, step)
    communication = None if ask.bandwidth is None else communication_bytes(step) / ask.bandwidth
    limit = ask.gpu.memory_gib * GIB
    fits = memory.peak + memory.slack <= limit
    return StagePlan(
        number,
        config,
        memory,
        fits,
        largest_per_gpu(step, limit),
        flops.model * ask.gpus / work.TERA,
        flops.executed * ask.gpus / work.TERA,
        rate.step_s(step) + (communication or 0.0) if rate is not None and fits else None,
        communication,
        rate,
    )


def _rate(ask: Ask, step: Work) -> Rate | None:
    if ask.rate is None:
        return rate_of(ask.gpu, step)
    return ask.rate if ask.rate.stage in (None, step.stage) else None


def communication_bytes(step: Work) -> float:
    """What a rank sends in a step (as much comes in): gradients, weights, the teacher, features; rings throughout."""
    if step.world == 1:
        return 0.0
    ds = read_ds_config(step.config.engine)
    sent = work.FP32 if ds.get("communication_data_type") == "fp32" else step.bytes
    elements = model_state.trained_elements(step.student)
    share = (step.world - 1) / step.world
    of_muon = optimizer.muon_elements(step) if step.stage == 3 else 0
    gradients = elements * sent * share * (2 if step.stage == 0 or of_muon else 1)
    gradients += 4 * of_muon * sent * share  # gradients and momenta are gathered, then updates and momenta again
    passes = {0: 0, 1: 1, 2: 1, 3: 2 * step.batch.splits + (1 if step.batch.splits > 1 else 0)}[step.stage]
    weights = elements * step.bytes * share * passes
    teacher = 0.0
    if step.teacher_grid is not None and step.stage:
        teacher = (
            step.bytes
            * share
            * sum(p.numel() for name, p in step.teacher.items() if name.startswith(("vision.", "objectives.")))
        )
    embeds = 2 * work.FP32 * (len(step.views) + 1) * step.batch.local * (step.world - 1) * step.config.model.embed_dim
    return gradients + weights + teacher + embeds


def largest_per_gpu(step: Work, limit: float) -> int | None:
    """The largest batch.per_gpu that fits and is what is then held at a time."""
    local = step.batch.local
    sizes = {-(-local // splits) for splits in range(1, local + 1)}
    for micro in sorted((size for size in sizes if settings.split_of(local, size) == size), reverse=True):
        split = dataclasses.replace(step.batch, micro=micro, splits=-(-local // micro))
        memory = memory_of(dataclasses.replace(step, batch=split))
        if memory.peak + memory.slack <= limit:
            return micro
    return None


def _steps(config: TrainConfig, ask: Ask) -> tuple[int, str]:
    """The run's optimizer steps, and what they go by."""
    if config.run.steps is not None:
        return config.run.steps, "run.steps"
    samples, source = ask.samples, ask.samples_source
    if samples is None:
        samples, source = YFCC15M, f"assumed: YFCC-15M, {YFCC15M:,} samples an epoch (--samples says yours)"
    return settings.count_steps(config, samples // config.batch.global_size), source


def _recommend(config: TrainConfig, ask: Ask, stages: dict[int, StagePlan]) -> tuple[int | None, int | None]:
    """The stage to take, None: nothing fits; and the batch.per_gpu that it needs, None: the configured one.

    The lower stage communicates less. A bf16 run is not sent to stage 0, which is fp32 alone.
    """
    is_bf16 = bool(read_ds_config(config.engine).get("bf16", {}).get("enabled"))
    order = [number for number in stages if number or not is_bf16 or len(stages) == 1]
    if ask.rate is not None and ask.rate.stage in stages:
        order = [ask.rate.stage, *(number for number in order if number != ask.rate.stage)]  # what was measured
    fitting = [number for number in order if stages[number].fits]
    if fitting:
        return fitting[0], None
    split = [number for number in order if stages[number].largest_per_gpu]
    if not split:
        return None, None
    best = max(split, key=lambda number: (stages[number].largest_per_gpu or 0, -number))
    return best, stages[best].largest_per_gpu


def _notes(plan: Plan) -> list[str]:
    ask, chosen = plan.ask, plan.chosen
    found = []
    if chosen.rate is None:
        found.append(
            f"no speed was measured for {ask.gpu.name} in this form: --probe measures here, --mfu 0.25 takes yours"
        )
    elif ask.gpus > 1 and ask.bandwidth is None:
        found.append("samples/s leave out what GPUs wait for each other: --bandwidth GB/s of a GPU counts it")
    if plan.recommended is None:
        found.append(
            "nothing fits: model.vision.checkpoint_every=1, model.text.checkpoint_every=1 recompute activations; or"
            " take an _offload file of ds_configs, or more GPUs"
        )
    if plan.config.distill.teacher and work.work_of(plan.config, ask.gpus).frozen is None:
        found.append(
            "distill.teacher: no run of ours is there, so the frozen model's weights and forward are not counted; they"
            " come on top"
        )
    for name, options in vars(plan.config.loss).items():
        if getattr(options, "weight", 0) and options.start:
            found.append(f"loss.{name} begins after {options.start:.0%} of the run: these are the numbers from then on")
    if muon := optimizer.muon_note(work.work_of(chosen.config, ask.gpus, ask.text_tokens)):
        found.append(muon)
    share = settings.plan_batch(plan.config.batch, ask.gpus)
    if plan.recommended is not None and share.splits > 1 and chosen.largest_per_gpu == share.local:
        found.append(f"batch.per_gpu={share.local} fits: no accumulation, and no second forward for it")
    if chosen.rate is not None and chosen.step_s is not None:
        executed = chosen.executed_tflop * work.TERA / ask.gpus / chosen.rate.flops_per_s
        if chosen.step_s - (chosen.communication_s or 0.0) > 1.01 * executed:
            found.append(
                "so small a batch on a GPU is bound by the host's launches: a larger batch, or fewer GPUs, cost less"
            )
    if plan.config.engine.fp8 != NO_FP8:
        found.append("engine.fp8: steps in fp8 were not measured; memory and speed are those of bf16")
    if chosen.rate is not None and not chosen.rate.is_compiled and plan.config.engine.compile != NO_COMPILE:
        found.append("compiled steps were not measured in this form: the speed is that of uncompiled ones")
    return found


def checkpoint_of(plan: Plan) -> dict[str, Any]:
    """A checkpoint's size, and what a save costs."""
    step = work.work_of(plan.chosen.config, plan.ask.gpus, plan.ask.text_tokens)
    trained = model_state.trained_elements(step.student)
    frozen = sum(p.numel() for p in step.student.values() if not p.requires_grad)
    matrices = optimizer.muon_elements(step)
    moments = work.FP32 * model_state.num_moments(plan.config.optim) * (trained - matrices)
    moments += (work.FP32 if step.stage in (0, 3) else step.bytes) * matrices
    total = work.FP32 * trained + moments + step.bytes * frozen
    for name, parameter in step.teacher.items():
        total += parameter.numel() * (work.FP32 if step.student[name].requires_grad else step.bytes)
    of_rank = total / plan.ask.gpus
    return {
        "gib": total / GIB,
        "gib_a_rank": of_rank / GIB,
        "stall_s": of_rank / SAVE_STALL_BYTES_PER_S,
        "write_s": of_rank / SAVE_WRITE_BYTES_PER_S,
        "disk_gib": total * (plan.config.checkpoint.keep_last + 1) / GIB,
    }


def data_rate(plan: Plan) -> dict[str, Any]:
    """What the shards must give."""
    speed = plan.time_of(plan.chosen)["samples_per_s"]
    if speed is None:
        return dict.fromkeys(("samples_per_s", "samples_per_s_a_node", "mb_per_s", "cores_a_node"))
    of_node = speed / plan.ask.nodes
    size = plan.ask.sample_bytes
    return {
        "samples_per_s": speed,
        "samples_per_s_a_node": of_node,
        "mb_per_s": None if size is None else speed * size / 1e6,
        "cores_a_node": of_node / DECODED_PER_CORE,
    }


def samples_of(config: TrainConfig) -> tuple[int, str, float] | None:
    """(samples, where that number is from, bytes of one) of local shards in data.train; None where they are not known.

    Raises UserError for shards that are named and are not there.
    """
    if not config.data.train:
        return None
    from amclip_ds.data.train_sources import training_sources
    from amclip_ds.shards.index import scan_shard
    from amclip_ds.shards.sources import is_remote

    shards = [shard for source in training_sources(config.data) for shard in source]
    if not shards or any(is_remote(path) for path in shards):
        return None
    chosen = sorted({0, len(shards) // 2, len(shards) - 1})
    counts = [scan_shard(shards[index]).entry.samples for index in chosen]
    sizes = [Path(shards[index]).stat().st_size for index in chosen]
    if not sum(counts):
        raise UserError(f"data.train: {shards[0]}: holds no samples")
    is_whole = len(chosen) == len(shards)
    total = sum(counts) if is_whole else round(sum(counts) / len(counts) * len(shards))
    source = (
        "counted in data.train" if is_whole else f"estimated from {len(chosen)} of {len(shards)} shards of data.train"
    )
    return total, source, sum(sizes) / sum(counts)
