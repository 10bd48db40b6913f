"""Cases about the average, accumulation, guards and activation checkpointing on real engines."""

import contextlib
import functools
import itertools
import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amclip_ds.engine import shards, teacher_copies
from amclip_ds.engine import student as student_module
from amclip_ds.engine.ds_config import EngineConfig
from amclip_ds.engine.shards import Shard, gather_whole
from amclip_ds.engine.zero3 import blocks_of
from amclip_ds.errors import AmclipError
from amclip_ds.model import init
from amclip_ds.model.config import HeadsConfig, LossConfig
from amclip_ds.model.features import Encoded, Losses, StudentInputs, Targets
from amclip_ds.model.teacher_model import TeacherModel
from amclip_ds.objectives import builder, chosen
from amclip_ds.optim import OptimConfig
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.communication_time import COMMUNICATION
from tests.distributed.batches import both, local_part
from tests.distributed.cases import Run, global_batch, pixels, running, tiny_model


def ema(ds: str, steps: int, momentum: float = 0.999, placement: str = "auto") -> dict[str, Any]:
    """The sharded average against dense ones, fp32 and bf16, of the gathered fp32 masters; and its publishing.

    Rank 0 returns {error, bf16_error, moved, published_error, changed}; the others {}.
    """
    with running(ds, steps=steps, momentum=(momentum, momentum), placement=placement) as run:
        start = run.student.full_state()
        names = [name for name, _ in run.teacher.placed.module.named_parameters()]
        dense = {name: start[name].clone() for name in names if name in start}
        low = {name: tensor.bfloat16() for name, tensor in dense.items()}
        frozen = {name for name, p in run.student.module.named_parameters() if not p.requires_grad}
        for step in range(steps):
            run.step(step)
            for name, master in run.student.full_state().items():
                if name in dense and name not in frozen:
                    dense[name].lerp_(master, 1 - momentum)
                    low[name].lerp_(master.bfloat16(), 1 - momentum)
        held = run.teacher.full_state()
        images = pixels(global_batch(0, run.model).teacher_uint8)
        run.teacher.publish()
        published = run.teacher.embed_images(images)
        seen = _dense_embeddings(run, dense, images) if dense else published
        run.teacher.update(0.5)
        before = run.teacher.embed_images(images)
        run.teacher.publish()
        after = run.teacher.embed_images(images)
        if run.runtime.rank:
            return {}
        return {
            "error": max(float((held[name] - dense[name]).abs().max()) for name in dense),
            "bf16_error": max(float((low[name].float() - dense[name]).abs().max()) for name in dense),
            "moved": max(float((dense[name] - start[name]).abs().max()) for name in dense),
            "frozen_moved": max(float((held[name] - start[name]).abs().max()) for name in frozen),
            "published_error": float((published - seen).abs().max()),
            "unpublished_change": float((before - published).abs().max()),
            "published_change": float((after - before).abs().max()),
        }


def misaligned(ds: str, in_order: bool = True) -> list[str]:
    """The trained parameters whose weights do not start at a multiple of 16 bytes in the engine's flat buffers.

    in_order False: the parameters as the model lists them, the logit scale first.
    """
    from amclip_ds import optim

    if not in_order:
        optim._is_odd = lambda parameter: False
    with running(ds, steps=1) as run:
        found = []
        for name, parameter in run.student.module.named_parameters():
            held = getattr(parameter, "ds_tensor", parameter)
            if parameter.requires_grad and held.data_ptr() % 16:
                found.append(name)
        return found


def first_masters(ds: str, rounded: bool = False) -> dict[str, Any]:
    """The masters before any step: those that are not the fp32 start, all of them, and how often a tensor was drawn at
    most. rounded: they begin as DeepSpeed makes them, by the weights in bf16."""
    draws: list[str] = []
    draw = init.init_tensor

    def counted(name: str, *given: Any) -> Tensor:
        draws.append(name)
        return draw(name, *given)

    init.init_tensor = counted
    if rounded:
        student_module.init_fp32_masters = lambda engine, first: None
    runtime = engine_runtime.start()
    model, objectives = tiny_model(), chosen(LossConfig(), HeadsConfig(hidden_dim=64, output_dim=16))
    optim = OptimConfig(name="adamw")
    student = student_module.StudentEngine(model, objectives, optim, EngineConfig(ds), seed=0, runtime=runtime)
    most = max(draws.count(name) for name, _ in student.module.named_parameters())
    held = shards.master_shards(student.engine)
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in student.module.named_parameters()}
    other = [
        name
        for name, shard in held.items()
        if not torch.equal(
            shard.tensor, draw(name, shapes[name], student.start).reshape(-1)[shard.start :][: shard.length]
        )
    ]
    engine_runtime.stop(runtime)
    return {"other": other, "masters": len(held), "draws": most}


class Stream:
    """In the place of a GPU's stream in which one engine gathers: who waited in it, among what else was done."""

    def __init__(self, done: list[str]) -> None:
        self._done = done

    def wait_stream(self, stream: Any) -> None:
        self._done.append("wait")


def gathers(ds: str, ordered: bool = True) -> dict[str, list[str]]:
    """What the engines of student and sharded teacher do in three steps, in order: wait (their gathers for the
    forward's stream), gather, write (to their shards). ordered False: the engines are left as DeepSpeed makes them."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload as Offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    done: dict[Any, list[str]] = {}
    built, gather = Offload.__init__, Coordinator._PartitionedParameterCoordinator__all_gather_params_

    def build(self: Any, *given: Any, **named: Any) -> None:
        built(self, *given, **named)
        own = self.param_coordinator._PartitionedParameterCoordinator__allgather_stream
        assert own is self._DeepSpeedZeRoOffload__allgather_stream, "one stream, by two names"
        done[self.param_coordinator] = []
        self._DeepSpeedZeRoOffload__allgather_stream = Stream(done[self.param_coordinator])

    def noted(self: Any, *given: Any, **named: Any) -> None:
        done[self].append("gather")
        gather(self, *given, **named)

    def writing(owner: Any, name: str, to: list[str]) -> None:
        method = getattr(owner, name)

        def write(*given: Any, **named: Any) -> Any:
            to.append("write")
            return method(*given, **named)

        setattr(owner, name, write)

    Offload.__init__, Coordinator._PartitionedParameterCoordinator__all_gather_params_ = build, noted
    if not ordered:
        student_module.gather_what_is_written = teacher_copies.gather_what_is_written = lambda engine: None
    with running(ds, steps=3, placement="sharded") as run:
        student, teacher = done.values()
        writing(run.student, "step", student)
        writing(run.student, "clamp_logit_scale", student)
        writing(run.teacher.placed, "publish", teacher)
        for step in range(3):
            run.step(step)
    return {"student": student, "teacher": teacher}


def _dense_embeddings(run: Run, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """What an unsharded teacher with these weights sees, in the dtype of the published one."""
    module = TeacherModel(run.model, builder(run.objectives))
    module.load_state_dict(weights, strict=False)
    module.to(run.student.dtype)
    with torch.no_grad():
        return module.embed_images(images)


def gradients_by_split(ds: str, breaks: str | None = None, roles: bool = False) -> dict[int, dict[str, Tensor]]:
    """Split -> parameter -> gradient of the same 16 samples, before any step. Whole on every rank. roles: cases.Run.

    breaks "boundary": every backward call ends the accumulation. "last": the last piece is outside of it.
    "masks": the second pass keeps other tokens than the first. "leaves": a block's gradients are reduced after each of
    its calls, as DeepSpeed would.
    """
    found = {}
    if breaks == "leaves":
        student_module.gradients_by_parameter = contextlib.nullcontext  # type: ignore[assignment]
    with running(ds, optim={"momentum": 0.0}, roles=roles) as run:
        halves = [
            local_part(global_batch(step, run.model), run.runtime.rank, run.runtime.world_size) for step in (0, 1)
        ]
        batch = both(*halves)
        batch = run.shortened(batch) if roles else batch
        local = batch.token_ids.shape[0]
        splits = (1, 2, 4, 8) if breaks else (8, 4, 3, 2, 1)  # the whole batch first would hide what a split leaves out
        for split in [split for split in splits if split <= local]:
            run.micro = -(-local // split)  # of three the last is smaller
            if split > 1 and breaks:
                _break(run, breaks, split)
            run.gradients(batch)
            found[split] = {
                name: _whole_gradient(run, p) for name, p in run.student.module.named_parameters() if p.requires_grad
            }
            run.student.set_lr(0.0)
            run.student.step()
    return found


def _whole_gradient(run: Run, parameter: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    if run.student.flat is not None:
        shard, mapping = None, parameter._hp_mapping
        if mapping is not None:
            flat = run.student.flat._optimizer.averaged_gradients[mapping.param_group_index].flat_partition
            held, place = mapping.hp_fragment_address, mapping.lp_fragment_address
            shard = Shard(flat.narrow(0, held.start, held.numel), place.start, place.numel, parameter.numel())
        return gather_whole(shard, parameter.shape, parameter.device)
    grad = safe_get_full_grad(parameter)
    return (parameter.grad if grad is None else grad).detach().float().clone()


def flat_gradients(ds: str, misplaced: int = 0) -> dict[str, Any]:
    """Three steps with flat gradients and three without, on the same ranks. misplaced: elements by which one piece goes
    to the wrong place.

    Returns losses and norms of both, the rounds of the largest group, the largest difference of a flat gradient from
    the fp32 mean of the ranks' own over that one's norm, and whether a tensor that got no gradient has one of zeros.
    """
    runtime = engine_runtime.start()
    plain = Run(ds, runtime=runtime, steps=3, flat=False, optim={"name": "adamw", "lr": 1e-3})
    rows = [plain.step(step) for step in range(3)]
    run = Run(ds, runtime=runtime, steps=3, optim={"name": "adamw", "lr": 1e-3})
    student, flat = run.student, run.student.flat
    assert plain.student.flat is None and flat is not None
    if misplaced:
        pieces = flat._rounds[0][0].pieces
        pieces[0] = pieces[0]._replace(place=pieces[0].place + misplaced, length=pieces[0].length - misplaced)
    named = {name: p for name, p in student.module.named_parameters() if p.requires_grad}
    unused, expected = next(iter(named)), {}
    reduce = student.engine.optimizer.reduce_gradients

    def remember(**words: Any) -> None:
        named[unused].grad = None
        for name, parameter in named.items():
            zeros = torch.zeros_like(parameter, dtype=torch.float32)
            expected[name] = run.comm.all_reduce_sum(zeros if parameter.grad is None else parameter.grad.float())
        reduce(**words)

    student.engine.optimizer.reduce_gradients = remember
    run.gradients(run.batch(0))
    found = {name: _whole_gradient(run, parameter) for name, parameter in named.items()}
    student.engine.optimizer.reduce_gradients = reduce
    student.set_lr(0.0)
    student.step()
    again = Run(ds, runtime=runtime, steps=3, optim={"name": "adamw", "lr": 1e-3})
    flat_rows = [again.step(step) for step in range(3)]
    result = {
        "plain": [(row["loss"], row["norm"]) for row in rows],
        "flat": [(row["loss"], row["norm"]) for row in flat_rows],
        "rounds": max(len(rounds) for rounds in flat._rounds),
        "error": max(
            float((found[name] - mean / runtime.world_size).norm() / mean.norm().clamp(min=1e-12))
            for name, mean in expected.items()
        ),
        "unused": float(found[unused].abs().max()),
        "left": [name for name, parameter in named.items() if parameter.grad is not None],
    }
    engine_runtime.stop(runtime)
    return result


def norms(ds: str, optim: str = "adamw") -> list[tuple[float, float]]:
    """The norm of each group in two steps, and in a third of which the last rank's gradients are NaN; each beside what
    DeepSpeed finds for the same gradients."""
    runtime = engine_runtime.start()
    run = Run(ds, runtime=runtime, steps=3, flat=False, optim={"name": optim})
    zero, found = run.student.engine.optimizer, []
    own, theirs = zero.get_grad_norm_direct, type(zero).get_grad_norm_direct

    def compared(*words: Any) -> Tensor:
        norm = own(*words)
        found.append((norm.item(), theirs(zero, *words).item()))
        return norm

    zero.get_grad_norm_direct = compared
    run.step(0)
    run.step(1)
    admit = run.guards.admit

    def poison(losses: Losses) -> Tensor:
        if runtime.rank == runtime.world_size - 1:
            losses.total.register_hook(lambda grad: grad * math.nan)
        return admit(losses)

    run.guards.admit = poison  # type: ignore[method-assign]
    run.step(2)
    engine_runtime.stop(runtime)
    return found


def _break(run: Run, what: str, split: int) -> None:
    student = run.student
    if what == "boundary":
        student.accumulate_gradients = contextlib.nullcontext  # type: ignore[method-assign]
    if what == "last":  # the piece's gradients never reach the reduction
        backward, calls = type(student).backward, iter(range(1, 10**6))

        def all_but_the_last(loss: Tensor) -> None:
            if next(calls) % (split + 1):
                backward(student, loss)

        student.backward = all_but_the_last  # type: ignore[method-assign]
    if what == "masks":
        encode = type(student).encode

        def other_tokens(inputs: StudentInputs, targets: Targets) -> Encoded:
            if torch.is_grad_enabled():
                [group] = inputs.groups
                assert group.keep_indices is not None
                shifted = (group.keep_indices + 1) % run.model.vision.grid**2
                inputs = inputs._replace(groups=(group._replace(keep_indices=shifted),))
            return encode(student, inputs, targets)

        student.encode = other_tokens  # type: ignore[method-assign]


def not_finite(ds: str, accumulation: int = 1, optim: str = "sgd") -> dict[str, Any]:
    """Steps 0 1 X 2 beside 0 1 2, where X has one NaN gradient on the last rank, then a NaN image there.

    Returns what each rank saw: decisions, reasons, the incidents, and whether the states are bit for bit alike.
    """
    runtime = engine_runtime.start()
    last = runtime.world_size - 1
    settings: dict[str, Any] = {
        "runtime": runtime,
        "accumulation": accumulation,
        "guards": {"max_skipped": 3},
        "optim": {"name": optim},
    }
    control = Run(ds, **settings)
    for step in (0, 1, 2):
        control.step(step)
    run = Run(ds, **settings)
    incidents: list[tuple[Any, ...]] = []
    run.guards._incident = lambda *words, **more: incidents.append((*words, more))
    ids = torch.arange(4) + 100 * runtime.rank
    for step in (0, 1):
        run.guards.account(step, run.step(step)["applied"], ids)
    before = run.state()

    admit = run.guards.admit

    def poison(losses: Losses) -> Tensor:
        if runtime.rank == last:
            losses.total.register_hook(lambda grad: grad * math.nan)
        return admit(losses)

    run.guards.admit = poison  # type: ignore[method-assign]
    bad_gradient = run.step(7)
    run.guards.admit = admit  # type: ignore[method-assign]
    run.guards.account(2, bad_gradient["applied"], ids)
    after_gradient, counted = run.state(), (run.guards.skipped, run.updates)
    bad_batch = run.batch(8)
    if runtime.rank == last:
        spoilt = bad_batch.views_uint8.float()
        spoilt[:, 1] = math.nan  # all of it: one pixel may be in a token that is removed
        bad_batch = replace(bad_batch, views_uint8=spoilt)
    bad_loss = run.step(8, batch=bad_batch)
    reason = run.guards.reason
    run.guards.account(3, bad_loss["applied"], ids)
    after_loss = run.state()
    good = run.step(2)
    run.guards.account(4, good["applied"], ids)
    stopped = ""
    try:
        for step in range(5, 12):
            run.guards.account(step, run.step(8, batch=bad_batch)["applied"], ids)
    except AmclipError as error:
        stopped = f"{type(error).__name__} {error.exit_code} {error}"
    result = {
        "applied": (bad_gradient["applied"], bad_loss["applied"], good["applied"]),
        "counted": counted,
        "reason": reason,
        "incidents": incidents,
        "stopped": stopped,
        "guards": run.guards.state_dict(),
        "gradient_left_it": same(before, after_gradient, weights_only=True),
        "loss_left_it": same(after_gradient, after_loss, weights_only=True)
        and same(
            {"student": after_gradient["student"]},
            after_loss,  # its statistics too; the teacher's crop was sound
        ),
        "next_is_control": same(control.state(), run.state(), True),
    }
    engine_runtime.stop(runtime)
    return result


def same(one: dict[str, Any], other: dict[str, Any], weights_only: bool = False) -> bool:
    """Bit for bit, on rank 0. weights_only: without running statistics, which follow every batch that is finite."""
    return all(
        torch.equal(tensor, other[who][name])
        for who in one
        for name, tensor in one[who].items()
        if not (weights_only and ("running_" in name or "num_batches" in name))
    )


def checkpointed(ds: str) -> dict[int, dict[str, Any]]:
    """checkpoint_every -> losses of 3 steps, gradient norms, and how often a step ran each block of both towers."""
    runtime = engine_runtime.start()
    found = {}
    for every in (0, 1, 2):
        run = Run(ds, runtime=runtime, depth=4, checkpoint_every=every, steps=3)
        calls = [0] * 8
        module: Any = run.student.module
        # By their first layer: the last block of a tower is run layer by layer (engine.savings.last_block).
        firsts = [block.norm1 for block in module.vision.blocks]
        firsts += [layer.layer_norm1 for layer in module.text.encoder.layers]
        for index, first in enumerate(firsts):
            first.register_forward_pre_hook(lambda *_, c=calls, i=index: c.__setitem__(i, c[i] + 1))
        rows = [run.step(step) for step in range(3)]
        found[every] = {
            "losses": [row["loss"] for row in rows],
            "norms": [row["norm"] for row in rows],
            "calls": [count / 3 for count in calls],
        }
    engine_runtime.stop(runtime)
    return found


def refused(ds: str, **settings: Any) -> str:
    """The one line with which a Run is refused, after its exit code."""
    runtime = engine_runtime.start()
    try:
        Run(ds, runtime=runtime, **settings)
    except AmclipError as error:
        return f"{error.exit_code} {error}"
    finally:
        engine_runtime.stop(runtime)
    return "not refused"


def compiled(ds: str, mode: str, backend: str = "inductor", placement: str = "auto") -> dict[str, Any]:
    """Losses and gradient norms with and without engine.compile, and the warnings it gave."""
    import warnings

    from amclip_ds.engine import compile as compiling

    compiling.BACKEND = backend
    runtime = engine_runtime.start()
    plain = Run(ds, runtime=runtime, steps=3)
    rows = [plain.step(step) for step in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(ds, runtime=runtime, compile=mode, steps=3, placement=placement)
        compiled_rows = [run.step(step) for step in range(3)]
    models: list[Any] = [run.student.module, run.teacher.placed.module]
    said = [str(warning.message) for warning in caught if "engine.compile" in str(warning.message)]
    engine_runtime.stop(runtime)
    return {
        "plain": [(row["loss"], row["norm"]) for row in rows],
        "said": said,
        "towers": [taken(model.vision.through_blocks) for model in models],
        "compiled": [(row["loss"], row["norm"]) for row in compiled_rows],
        "blocks": [sorted({taken(block.forward) for block in blocks_of(model)}) for model in models],
    }


def in_fp8(ds: str) -> dict[str, Any]:
    """Two steps with engine.fp8=none and all, towers compiled; emulated, as no setting does."""
    from amclip_ds.engine import compile as compiling
    from amclip_ds.engine import fp8

    compiling.BACKEND = "aot_eager"
    fp8.check_machine = lambda device: None
    fp8.convert_towers = functools.partial(fp8.convert_towers, emulate=True)
    runtime = engine_runtime.start()
    found: dict[str, Any] = {}
    for mode in ("none", "all"):
        run = Run(ds, runtime=runtime, compile="tower", fp8=mode, steps=2)
        rows = [run.step(step) for step in range(2)]
        states = [run.student.full_state(), run.teacher.full_state()]
        models: list[Any] = [run.student.module, run.teacher.placed.module]
        found[mode] = {
            "rows": [(row["loss"], row["norm"]) for row in rows],
            "states": [{name: tuple(value.shape) for name, value in state.items()} for state in states],
            "names": [[name for name, _ in model.named_parameters()] for model in models],
            "layers": [run.student.in_fp8, run.teacher.placed.in_fp8],
            "towers": [taken(model.vision.through_blocks) for model in models],
        }
    engine_runtime.stop(runtime)
    return found


def taken(function: Any) -> str:
    """plain | compiled, or why it failed."""
    return getattr(function, "failed", "plain") or "compiled"


def communication_time(ds: str, late_rank: int, late_s: float, through_the_door: bool = True) -> dict[str, float]:
    """Two steps; before the second, one rank comes late. Seconds in collectives of the second, and of a pause after."""
    with running(ds) as run:
        if not through_the_door:  # DeepSpeed's own collectives untimed
            import deepspeed.comm.comm as ds_comm

            ds_comm.cdb = ds_comm.cdb._backend
        waiting, calls = COMMUNICATION.waiting, itertools.count()

        def counted() -> contextlib.AbstractContextManager[None]:
            next(calls)
            return waiting()

        run.step(0)
        COMMUNICATION.waiting = counted  # type: ignore[method-assign]
        COMMUNICATION.take()
        began = time.perf_counter()
        if run.runtime.rank == late_rank:
            time.sleep(late_s)
        run.step(1)
        elapsed, waited = time.perf_counter() - began, COMMUNICATION.take()
        with COMMUNICATION.paused():
            run.comm.all_reduce_sum(torch.ones(1))
        return {"elapsed": elapsed, "waited": waited, "paused": COMMUNICATION.take(), "calls": next(calls)}
