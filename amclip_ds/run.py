"""What a run is made of, put together in order: ranks, folder, data, engines, record, checkpoints. train.py runs it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from amclip_ds import config as settings
from amclip_ds import plugins, preconditions, run_files
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.config import BatchPlan, TrainConfig
from amclip_ds.data.batch import Batch
from amclip_ds.data.ledger import Ledger, listed_in
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.train_sources import training_shards
from amclip_ds.distill import FrozenTeacher
from amclip_ds.engine.compile import reported
from amclip_ds.engine.ds_config import NO_COMPILE, compile_mode_of, read_ds_config, stage_of
from amclip_ds.engine.memory import begin_peak
from amclip_ds.engine.student import StudentEngine
from amclip_ds.engine.teacher import Teacher
from amclip_ds.errors import UserError
from amclip_ds.evaluate.datasets import check_sets
from amclip_ds.forecast import Forecast, device_of
from amclip_ds.meter import Meter
from amclip_ds.method import Method, method_of
from amclip_ds.model import pretrained
from amclip_ds.optim import Schedules, endless_warmup
from amclip_ds.pictures import Pictures
from amclip_ds.plan.work import operations
from amclip_ds.ranks import runtime as engine_runtime
from amclip_ds.ranks.collectives import DistributedComm, gather_objects, on_main
from amclip_ds.ranks.launcher_env import SlurmJob
from amclip_ds.ranks.preflight import preflight
from amclip_ds.ranks.runtime import Runtime
from amclip_ds.record import Record
from amclip_ds.record.profiling import Profile
from amclip_ds.record.timeline import Timeline
from amclip_ds.redact import redact_all
from amclip_ds.resilience.guards import Guards
from amclip_ds.resilience.ownership import owning
from amclip_ds.resilience.preemption import Preemption, leaving_together
from amclip_ds.resilience.watchdog import Watchdog
from amclip_ds.run_checkpoints import RunCheckpoints, find_checkpoint
from amclip_ds.run_folder import open_folder, set_weights_aside, write_settings, write_verdict_at_end
from amclip_ds.run_state import TrainState


@dataclass
class Run:
    """The parts of a run, in the order in which they come to be."""

    config: TrainConfig
    runtime: Runtime
    comm: DistributedComm
    method: Method
    plan: BatchPlan
    folder: Path
    attempt: int
    stops: Preemption
    watchdog: Watchdog
    timeline: Timeline
    state: TrainState
    data: TrainingData
    total_steps: int
    record: Record
    student: StudentEngine
    teacher: Teacher | None
    frozen: FrozenTeacher | None
    schedules: Schedules
    guards: Guards
    ledger: Ledger
    meter: Meter
    profile: Profile
    checkpoints: RunCheckpoints
    forecast: Forecast
    pictures: Pictures

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps to come, on the device (to a GPU from workers: data/prefetch.py, one ahead)."""
        waited_for = self.meter.timed(self.data.batches(self.state.cursor))
        on_device = (batch.to(self.runtime.device) for batch in waited_for)
        stream = self.watchdog.watched(on_device, self.state.step)
        if self.state.step < self.total_steps:
            with self.timeline.during("first_batch"):
                first = [next(stream)]
            yield first.pop()  # a name for it would keep it in memory for the whole run
        while self.state.step < self.total_steps:
            yield next(stream)


def assemble(config: TrainConfig, resume: str, stack: ExitStack, began: float | None = None) -> Run:
    """Builds a run and takes over the checkpoint that `resume` means; `stack` ends it, the last part first.

    Collective: every rank must call. Raises UserError for what the user can fix.
    """
    runtime = engine_runtime.start(deterministic=config.run.deterministic)
    stack.callback(engine_runtime.stop, runtime)
    begin_peak(runtime.device)
    stack.enter_context(leaving_together(runtime))
    on_main(partial(settings.check_buildable, config))
    on_main(partial(preconditions.check_engine, config))
    comm = DistributedComm()
    plan, method = settings.plan_batch(config.batch, runtime.world_size), method_of(config)

    job = engine_runtime.current_job() if runtime.is_main else SlurmJob()
    owner = stack.enter_context(owning(Path(config.run.out), config.ownership, job=job.job, restart=job.restart))
    folder, attempt = on_main(partial(open_folder, config))
    if owner is not None:
        owner.set_attempt(attempt)
    timeline = open_timeline(config, folder, attempt, runtime, job, began)
    stops = stack.enter_context(Preemption(config.preemption, folder, runtime, owner, job.end, config.run.time_limit))
    watchdog = stack.enter_context(Watchdog(config.watchdog, folder, attempt, runtime))
    comm.on_arrival = watchdog.arrived
    state = TrainState()
    stack.enter_context(write_verdict_at_end(folder, attempt, state, runtime.is_main, owner))

    ranks = Ranks(config.checkpoint.timeout_s)
    with watchdog.during("verify"), timeline.during("verify"):
        found = find_checkpoint(folder, resume, config, ranks)
    with watchdog.during("index"), timeline.during("index"):
        evaluated_on = on_main(partial(check_evaluation, config, is_resumed=found is not None))
        alive = partial(watchdog.phase, "index", 0)  # an index of hours is no hang while it gets from shard to shard
        data = stack.enter_context(closing(open_data(config, method, runtime, found is not None, alive)))
    total_steps = settings.count_steps(config, data.steps_per_epoch)
    first_step = found.manifest.step if found else 0
    record = stack.enter_context(open_record(config, folder, attempt, runtime, data, total_steps, first_step))
    lines = [describe(config, runtime, plan, data, total_steps)]
    if endless := endless_warmup(config.optim, total_steps):
        lines.append(f"optim.warmup_steps: warning: {'; '.join(endless)} is a twentieth of the run")
    for line in [*lines, *preconditions.about_unread(config), *evaluated_on]:
        record.say(line)
    forecast = on_main(partial(Forecast, config, runtime.world_size, device_of(runtime)))
    record.say(forecast.line())
    if runtime.world_size > 1:
        preflight(runtime, config_text=settings.dump(config), shards=data.shards, folder=folder, say=record.say)

    # A resumed run's weights are its checkpoint's: where the first ones came from need not exist any more.
    fresh = config if found is None else replace(config, model=replace(config.model, init_from=None))
    stage = stage_of(read_ds_config(config.engine))
    if compile_mode_of(str(config.engine.compile), stage, runtime.device.type) != NO_COMPILE:
        engine_runtime.keep_compiled(folder)
        stack.enter_context(reported(watchdog.compile_begins, watchdog.compile_ends))
    with timeline.during("build"):
        student, teacher = build_engines(fresh, method, runtime)
        stack.enter_context(student)
    for line in describe_engines(fresh, student, teacher):
        record.say(line)
    frozen, taught_by = None, ""
    if method.reads_frozen and config.distill.teacher:
        frozen = FrozenTeacher(config.distill.teacher, config.model, runtime.device)
        record.say(frozen.about)
        taught_by = on_main(frozen.hash_weights)
    guards = Guards(config.guards, record.incident)
    meter = Meter(
        config.batch.global_size, runtime, config.data.workers, operations(config, runtime.world_size), student
    )
    profile = Profile(folder, config.run.profile, runtime.is_main, record.say, runtime.device.type == "cuda")
    stack.callback(profile.close)

    checkpoints = stack.enter_context(
        RunCheckpoints(
            folder,
            config,
            ranks,
            student=student,
            teacher=teacher,
            guards=guards,
            record=record,
            attempt=attempt,
            data_fingerprint=data.fingerprint,
            data_contents=data.contents,
            hashes={"words": data.words_hash, "excluded": data.excluded_hash, "teacher": taught_by},
            before_commit=owner.check if owner else lambda: None,
            pausing=partial(saving, meter, watchdog, timeline),
        )
    )
    with watchdog.during("resume"), timeline.during("resume"):
        checkpoints.resume(found, state)
        for path in on_main(partial(set_weights_aside, folder)) if state.step < total_steps else ():
            record.say(f"set aside, since training continues: {path}")
        listed = on_main(partial(listed_in, folder / run_files.INCIDENTS)) if found is not None else None
        timeline.step = state.step
        if found is not None:
            saved = found.manifest
            timeline.add("resumed", checkpoint=str(found.path), world_size=saved.world_size, stage=saved.stage)
        if runtime.is_main:
            write_settings(folder, config, record.replace)
    pictures = Pictures(config.log, config.checkpoint, method, data, record, runtime.device, total_steps)
    return Run(
        config=config,
        runtime=runtime,
        comm=comm,
        method=method,
        plan=plan,
        folder=folder,
        attempt=attempt,
        stops=stops,
        watchdog=watchdog,
        timeline=timeline,
        state=state,
        data=data,
        total_steps=total_steps,
        record=record,
        student=student,
        teacher=teacher,
        frozen=frozen,
        schedules=Schedules(config.optim, config.teacher, total_steps),
        guards=guards,
        ledger=Ledger(config.data.max_skip_rate, gather_objects, data.account, listed),
        meter=meter,
        profile=profile,
        checkpoints=checkpoints,
        forecast=forecast,
        pictures=pictures,
    )


def open_timeline(
    config: TrainConfig, folder: Path, attempt: int, runtime: Runtime, job: SlurmJob, began: float | None
) -> Timeline:
    """The run by the clock, with this start in it."""
    timeline = Timeline(folder, attempt, runtime.is_main, began)
    timeline.start(
        world_size=runtime.world_size,
        num_nodes=runtime.num_nodes,
        device=runtime.device.type,
        launcher=runtime.launcher,
        engine=config.engine.deepspeed,
        job=job.job,
        restart=job.restart,
    )
    return timeline


def open_record(
    config: TrainConfig,
    folder: Path,
    attempt: int,
    runtime: Runtime,
    data: TrainingData,
    total_steps: int,
    first_step: int,
) -> Record:
    """What the run writes down."""
    return Record(
        folder,
        config.log,
        rank=runtime.rank,
        world_size=runtime.world_size,
        attempt=attempt,
        total_steps=total_steps,
        samples_per_epoch=data.samples_per_epoch,
        first_step=first_step,
        run_config=redact_all(asdict(config)),
        checkpoint_every=config.checkpoint.every_steps,
    )


@contextmanager
def saving(meter: Meter, watchdog: Watchdog, timeline: Timeline, event: str) -> Iterator[None]:
    """While training waits for a save: no step's time, and watched by the limit of long phases. event: save | commit,
    as the time line has it."""
    with meter.paused(), watchdog.during("save"), timeline.during(event):
        yield


def check_evaluation(config: TrainConfig, *, is_resumed: bool) -> list[str]:
    """What eval.data was understood as, a line a set. Raises UserError for a mistake in it, but never for a run that
    continues: there it costs the evaluations alone."""
    try:
        trained_on = training_shards(config.data) if config.eval.data else ()
        return [f"evaluation on {line}" for line in check_sets(config.eval.data, trained_on)]
    except UserError as error:
        if not is_resumed:
            raise
        return [f"no evaluation: {error}; training continues"]


def build_engines(config: TrainConfig, method: Method, runtime: Runtime) -> tuple[StudentEngine, Teacher | None]:
    """The student, and the teacher where anything reads it. Collective: every rank must call."""
    student = StudentEngine(
        config.model, method.objectives, config.optim, config.engine, seed=config.run.seed, runtime=runtime
    )
    if not method.needs_teacher:
        return student, None
    return student, Teacher(
        config.teacher,
        config.model,
        method.objectives,
        averages_text_ends=method.compat.averages_text_ends,
        student=student,
        device=runtime.device,
    )


def describe_engines(config: TrainConfig, student: StudentEngine, teacher: Teacher | None) -> list[str]:
    """What is not plain in their weights: fp8, and where the first ones came from."""
    in_fp8 = {"student": student.in_fp8, "teacher": teacher.placed.in_fp8 if teacher else ""}
    lines = [f"engine.fp8: of the {who}'s Linear layers {n} compute in fp8" for who, n in in_fp8.items() if n]
    if config.model.init_from:
        lines += pretrained.describe(config.model.init_from, dict(student.module.named_parameters()))
        lines += preconditions.about_pooling(config)
    return lines


def open_data(
    config: TrainConfig,
    method: Method,
    runtime: Runtime,
    resumes: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> TrainingData:
    """This rank's part of the training stream. on_progress: see TrainingData."""
    vision = config.model.vision
    teacher_size = config.teacher.image_size(vision.image_size)
    return TrainingData(
        config.data,
        seed=config.run.seed,
        global_batch=config.batch.global_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        image_size=vision.image_size,
        teacher_size=teacher_size if method.has_teacher_crop else None,
        fills_text_budget=method.compat.fills_text_budget,
        hidden_share=method.hidden_share,
        teacher_contains=method.compat.teacher_sees_views,
        num_units=method.draws,
        draws_twice=method.draws_twice,
        context_length=config.model.text.context_length,
        once=on_main,
        index_dir=config.run.out,
        device=runtime.device,
        resumes=resumes,
        prepare=partial(plugins.again, list(plugins.LOADED.values())) if plugins.LOADED else None,
        on_progress=on_progress,
    )


def describe(config: TrainConfig, runtime: Runtime, plan: BatchPlan, data: TrainingData, total_steps: int) -> str:
    """The run in one line, before its first step."""
    accumulated = f" (accumulated over {plan.split_in_words})" if plan.splits > 1 else ""
    started = "alone" if runtime.launcher == "alone" else f"by {runtime.launcher}"
    note = f"; {runtime.note}" if runtime.note else ""
    return (
        f"run {config.run.out}: {total_steps} steps of {config.batch.global_size} = {runtime.world_size} ranks x"
        f" {plan.local}{accumulated}, {data.samples_per_epoch} samples an epoch, {config.engine.deepspeed},"
        f" {runtime.device.type}, started {started}{note}"
    )
