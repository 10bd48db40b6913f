"""A plan for people, in lines of at most 80 columns, and its formulas with their numbers."""

import textwrap
from collections.abc import Iterable, Iterator

from amclip_ds.config import plan_batch
from amclip_ds.plan import work
from amclip_ds.plan.optimizer import learning_rate_lines
from amclip_ds.plan.planner import FRAGMENTED, GIB, Plan, StagePlan, checkpoint_of, communication_bytes, data_rate
from amclip_ds.plan.work import TERA

MEANING = {
    "parameters": "weights in the dtype of the forward",
    "gradients": "those there are at the peak",
    "masters": "fp32 weights of the optimizer",
    "moments": "of the optimizer",
    "ema": "the teacher's average, fp32",
    "teacher": "its copy for the forward",
    "distill": "distill.teacher's weights, fp32",
    "activations": "of both towers",
    "logits": "logits and heads of objectives",
    "images": "views and teacher's crop, uint8",
    "photometric": "changed views, fp32",
    "transient": "for a moment, on top",
    "muon": "updates, and at ZeRO-3 whole matrices, for a moment",
    "buckets": "what ZeRO sends or gathers",
}


def show(lines: Iterable[str]) -> None:
    """Prints them, folded at 80 columns."""
    for line in lines:
        print("\n".join(textwrap.wrap(line, 80, subsequent_indent="    ", break_long_words=False)) or "")


def lines(plan: Plan, recipe: str) -> Iterator[str]:
    """The plan: a line a stage, the parts of the recommended one, time, checkpoint, data, notes."""
    ask, share = plan.ask, plan_batch(plan.config.batch, plan.ask.gpus)
    yield f"{recipe} on {ask.gpus} x {ask.gpu.name} ({ask.gpu.memory_gib:g} GiB), {ask.nodes} node(s)"
    splits = f", {share.split_in_words}" if share.splits > 1 else ""
    yield f"batch: {plan.config.batch.global_size} = {ask.gpus} x {share.local}{splits}"
    yield ""
    sizes = "".join(f"{word:>8}" for word in ("state", "activ.", "peak", "needs"))
    yield f"{'ZeRO':<5}{sizes}  {'fits':<5}{'per_gpu':>8}{'samples/s':>11}{'hours':>9}"
    for number, stage in plan.stages.items():
        yield _stage_line(plan, number, stage)
    for number, reason in plan.impossible.items():
        yield f"{number:<5}{reason}"
    yield "GiB on the fullest GPU; needs: with CUDA's context and fragments; per_gpu: the"
    yield "largest batch.per_gpu that fits"
    yield ""
    yield from _recommendation(plan)
    yield ""
    chosen = plan.chosen
    micro = plan_batch(chosen.config.batch, ask.gpus).micro
    held = f", {micro} samples at a time" if micro != share.micro else ""
    yield f"memory at stage {chosen.stage} ({chosen.file}{held}), at its peak ({chosen.memory.moment}):"
    for part, size in chosen.memory.by_part.items():
        if size:
            yield f"  {part:<12}{size / GIB:9.2f} GiB  {MEANING[part]}"
    yield f"  {'slack':<12}{chosen.memory.slack / GIB:9.2f} GiB  context, and {FRAGMENTED:.0%} of the peak in fragments"
    yield ""
    yield from _cost_lines(plan)
    yield from learning_rate_lines(plan.config, plan.steps)
    for note in plan.notes:
        yield f"note: {note}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _stage_line(plan: Plan, number: int, stage: StagePlan) -> str:
    memory, time = stage.memory, plan.time_of(stage)
    return (
        f"{number:<5}{sum(memory.state.values()) / GIB:8.2f}{memory.activations / GIB:8.2f}{memory.peak / GIB:8.2f}"
        f"{(memory.peak + memory.slack) / GIB:8.2f}  {'yes' if stage.fits else 'no':<5}{stage.largest_per_gpu or 0:>8}"
        f"{_number(time['samples_per_s'], ',.0f'):>11}{_number(time['hours'], ',.1f'):>9}"
    )


def _recommendation(plan: Plan) -> Iterator[str]:
    if plan.recommended is None:
        yield "recommended: none fits"
        return
    added = f": {' '.join(plan.settings)}" if plan.settings else " (as configured)"
    yield f"recommended: stage {plan.recommended}{added}"


def _cost_lines(plan: Plan) -> Iterator[str]:
    chosen, time, ask = plan.chosen, plan.time_of(plan.chosen), plan.ask
    yield f"work: {chosen.tflop_per_step:,.2f} TFLOP a step ({chosen.executed_tflop:,.2f} executed)"
    yield f"length: {plan.steps:,} steps of {plan.config.batch.global_size:,} ({plan.samples_source})"
    if chosen.rate is not None and chosen.step_s is not None:
        mfu = "" if time["mfu"] is None else f", {time['mfu']:.1%} of the GPU's peak"
        yield f"speed: {time['samples_per_s']:,.0f} samples/s, {chosen.step_s:.3f} s a step{mfu}"
        yield f"  from: {chosen.rate.source}"
        if chosen.communication_s is not None:
            yield f"  {chosen.communication_s:.3f} s of a step are communication (--bandwidth)"
        power = "" if time["kwh"] is None else f", {time['kwh']:,.1f} kWh (GPUs at full power)"
        price = "" if time["cost"] is None else f", {time['cost']:,.2f} at {ask.price:g} a GPU-hour"
        hours = f"{time['hours']:,.2f} h = {time['node_hours']:,.1f} node-hours = {time['gpu_hours']:,.1f} GPU-hours"
        yield f"time: {hours}{power}{price}"
        data = data_rate(plan)
        size = "" if data["mb_per_s"] is None else f", {data['mb_per_s']:,.1f} MB/s in all"
        cores = f"about {data['cores_a_node']:,.1f} cores to decode"
        yield f"data: {data['samples_per_s_a_node']:,.0f} samples/s a node{size}, {cores}"
    saved = checkpoint_of(plan)
    yield (
        f"checkpoint: {saved['gib']:.2f} GiB ({saved['gib_a_rank']:.2f} a rank): training waits"
        f" {saved['stall_s']:.2f} s, written in {saved['write_s']:.1f} s"
    )
    kept = f"checkpoint.keep_last={plan.config.checkpoint.keep_last}"
    yield f"  {saved['disk_gib']:.1f} GiB on disk with {kept} and one under way"


def explain(plan: Plan) -> Iterator[str]:
    """The formulas with their numbers, of the recommended stage."""
    chosen = plan.chosen
    step = work.work_of(chosen.config, plan.ask.gpus, plan.ask.text_tokens)
    tower, text, W = step.tower, plan.config.model.text, step.world
    trained = sum(p.numel() for p in step.student.values() if p.requires_grad)
    frozen = sum(p.numel() for p in step.student.values() if not p.requires_grad)
    teacher = sum(p.numel() for p in step.teacher.values())
    hidden = int(text.width * text.mlp_ratio)
    yield f"P = {trained:,} trained, F = {frozen:,} frozen, T = {teacher:,} of the teacher; W = {W} ranks;"
    share = step.batch
    yield f"w = {step.bytes} bytes a number in the forward; b = {share.micro} samples at a time of {share.local}"
    yield "model state: docs/memory.md has each part at each stage:"
    for part, size in chosen.memory.state.items():
        yield f"  {part:<11} {size:,.0f} bytes"
    tokens = [1 + kept for kept in step.views]
    yield f"vision: {tower.depth} blocks, width D = {tower.width}, hidden M = {tower.hidden}, {tower.heads} heads;"
    yield f"  tokens of the views: {tokens}"
    yield f"text: {text.depth} blocks, width {text.width}, hidden {hidden}, {step.text_tokens} tokens"
    of_image = work.block_bytes(tower.width, tower.hidden, tower.heads, step.bytes)
    yield "activations a token and block: w (8 D + 2 M) + 4 (4 + heads) bytes: the inputs and outputs of two norms,"
    yield f"  q, k, v, attention's output, the hidden layer before and after GELU = {of_image:,} bytes"
    yield "  (quick_gelu uncompiled keeps the hidden layer three times; a recomputed block keeps its input, w D)"
    acts = work.activations_of(step)
    yield f"  towers {acts.towers:,.0f}, logits and heads {acts.objectives:,.0f} bytes;"
    yield f"  for a moment {acts.transient:,.0f}"
    yield "logits: 2 directions a view of [B, W B] fp32, before and after the softmax: 16 V B (W B)"
    yield "  bytes, or a chunk at a time"
    yield "peak = max of backward (state without gradients + activations + logits + images + buckets + a moment),"
    yield "  step (state + a fp32 copy of the gradients of a rank), publish (state + the teacher's all-gather)"
    flops = work.flops_of(step)
    yield "FLOP of a forward: 2 x multiply-adds; block: tokens (8 D^2 + 4 D M) + 4 tokens^2 D; backward: twice the"
    yield "  linear layers, 2.5 times attention; the teacher: a forward of its crop;"
    yield "  distill.teacher: one of each view and of the text"
    for name in ("vision", "text", "teacher", "objectives", "again"):
        yield f"  {name:<11} {getattr(flops, name) / TERA:,.3f} TFLOP a rank" + (
            " (runs a second time)" if name == "again" else ""
        )
    if chosen.rate is not None:
        rate = f"{chosen.rate.flops_per_s / TERA:,.1f} TFLOP/s ({chosen.rate.source})"
        yield f"step = executed FLOP / {rate}, no less than {chosen.rate.launch_s * 1e3:.2f} ms a"
        yield f"  block's pass x {work.block_passes(step):g} passes, + communication"
    yield f"communication of a rank: {communication_bytes(step) / 1e9:,.3f} GB a step / --bandwidth"
    yield "checkpoint: 4 P (masters) + 4 m P (moments; of Muon's matrices one) + w F + 4 T, cut by W; a rank copies"
    yield "  42.7 GB/s and writes 0.62 GB/s (measured)"
