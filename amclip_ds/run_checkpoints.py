"""The checkpoints of one run: which one it resumes from, what it takes over, when it saves, where a rewind goes to.

    found = find_checkpoint(folder, resume, config, ranks)      # before the record opens: gives the first step
    checkpoints = RunCheckpoints(...)                           # once there are engines and data
    checkpoints.resume(found, state)
    checkpoints.after_step(state, is_last)                      # in the loop

Everything is collective: every rank must call.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amclip_ds import config as settings
from amclip_ds import run_files
from amclip_ds.checkpoint import drift, load, retention, trainer_json
from amclip_ds.checkpoint import state as engines_state
from amclip_ds.checkpoint.load import FoundCheckpoint
from amclip_ds.checkpoint.ranks import Ranks
from amclip_ds.checkpoint.save import Saver
from amclip_ds.checkpoint.state import CheckpointState
from amclip_ds.config import TrainConfig
from amclip_ds.data.captions import tokenizer_hash
from amclip_ds.errors import RunStopped
from amclip_ds.files import not_written
from amclip_ds.ranks.collectives import on_main
from amclip_ds.record import Record, supersede
from amclip_ds.resilience.guards import Guards
from amclip_ds.run_state import TrainState

if TYPE_CHECKING:
    from amclip_ds.engine.student import StudentEngine
    from amclip_ds.engine.teacher import Teacher


def find_checkpoint(folder: Path, resume: str, config: TrainConfig, ranks: Ranks) -> FoundCheckpoint | None:
    """The checkpoint that `--resume` means, verified; None for a fresh start. Raises UserError on every rank."""
    return load.find(folder / run_files.CHECKPOINTS, resume, config.checkpoint.fallback, ranks)


class RunCheckpoints:
    """Saves and restores one run. As a context it ends with the last save committed.

    before_commit: called on rank 0 before each commit; what it raises (OwnershipLost) aborts the save everywhere.
    pausing: entered around what training waits for. See Saver.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        ranks: Ranks,
        *,
        student: "StudentEngine",
        teacher: "Teacher | None",
        guards: Guards,
        record: Record,
        attempt: int,
        data_fingerprint: str,
        data_contents: str,
        hashes: Mapping[str, str],
        before_commit: Callable[[], None] = lambda: None,
        pausing: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._folder, self._config, self._ranks, self._record = folder, config, ranks, record
        self._student, self._teacher, self._guards, self._attempt = student, teacher, guards, attempt
        self._hashes = {"data": data_fingerprint, "tokenizer": tokenizer_hash()}
        if data_contents:
            self._hashes["contents"] = data_contents
        self._hashes |= {name: of for name, of in hashes.items() if of}
        self._config_text = settings.dump(config)
        self._drift: list[str] = []
        self._saver = Saver(
            folder / run_files.CHECKPOINTS,
            config.checkpoint,
            ranks,
            say=record.say,
            before_commit=before_commit,
            incident=lambda kind, cause, action: record.incident(kind, cause, action=action),
            pausing=pausing,
        )

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._saver.__exit__(*error)

    def resume(self, found: FoundCheckpoint | None, counts: TrainState) -> None:
        """Takes a checkpoint over into engines, guards and `counts`, and sets aside what will be written again.

        Raises UserError, before anything is touched, where the run has drifted from the checkpoint's.
        """
        if found is not None:
            self._check_drift(found)
            self._fill(found, counts)
        on_main(partial(self._set_aside, found))
        if found is not None:
            is_ours = found.path.resolve().parent == (self._folder / run_files.CHECKPOINTS).resolve()
            self._saver.newest = found.manifest.step if is_ours else None
            self._report_resume(found)

    def after_step(self, counts: TrainState, is_last: bool) -> None:
        """Saves where it is due (by steps, by the clock, at the end); `is_last` waits for the commit. See Saver."""
        self._saver.after_step(counts.step, is_last, partial(self._state, counts))

    def settle(self) -> None:
        """Waits until a save under way is committed, or has failed, which is recorded."""
        self._saver.settle()

    def rewind(self, counts: TrainState) -> None:
        """Back to the newest checkpoint's weights, moments, average and updates; the place in the data stays.

        `settle` comes first.
        """
        self._saver.finish()  # removals: none may take what is read here
        found = load.find(self._folder / run_files.CHECKPOINTS, "auto", True, self._ranks)
        if found is None:
            raise RunStopped("guards.spike=rewind: there is no checkpoint yet to go back to")
        kept = asdict(counts)
        self._fill(found, counts)
        counts.step, counts.samples_seen = kept["step"], kept["samples_seen"]
        counts.epoch, counts.cursor = kept["epoch"], kept["cursor"]
        self._record.say(f"rewound to the weights of {found.path.name}; the data continue behind step {counts.step}")

    def _state(self, counts: TrainState) -> CheckpointState:
        counts.guards = self._guards.state_dict()
        state = engines_state.of_engines(self._student, self._teacher)
        plan = settings.plan_batch(self._config.batch, self._ranks.world_size)
        state.small |= {"run": asdict(counts), "batch": asdict(plan)}
        state.config, state.hashes = self._config_text, self._hashes
        state.attempt, state.drift = self._attempt, self._drift
        return state

    def _fill(self, found: FoundCheckpoint, counts: TrainState) -> None:
        run = {name: found.small["run"][name] for name in trainer_json.RUN}
        state = engines_state.ready_to_fill(self._student, self._teacher, bool(found.moments))
        load.fill(found, state, self._ranks)
        engines_state.bring_up_to_date(self._student, self._teacher, found.small)
        for name, value in run.items():
            setattr(counts, name, value)
        self._guards.load_state_dict(run["guards"])

    def _check_drift(self, found: FoundCheckpoint) -> None:
        precision = str(self._student.dtype).removeprefix("torch.")
        changes = drift.changes_between(
            found.config,
            self._config_text,
            found.manifest.hashes,
            self._hashes,
            found.manifest.precision,
            precision,
            default_config=settings.dump(type(self._config)()),
        )
        for change in changes:
            self._record.say(
                f"differs from the checkpoint: {change}" + ("" if change.is_free else " (changes training results)")
            )
        allowed = drift.allowances(self._config.checkpoint.allow_drift, self._config.data.on_change)
        overridden = drift.refuse_or_allow(changes, allowed)
        for change in overridden if self._ranks.is_main else ():
            self._record.incident("drift", str(change), key=change.key, action=f"allowed by {allowed[change.key]}")
        new = [f"step {found.manifest.step}: {change}" for change in overridden]
        self._drift = [*found.manifest.drift, *new]

    def _set_aside(self, found: FoundCheckpoint | None) -> None:
        """Rows and checkpoints of steps that will be written again. Rank 0 only."""
        step = found.manifest.step if found else 0
        checkpoints = self._folder / run_files.CHECKPOINTS
        try:
            for name, count in supersede(self._folder, step).items():
                cause = f"{name}: {count} lines are no rows of a step"
                self._record.say(f"{cause}; set aside in {Path(name).stem}.unreadable.txt")
                self._record.incident("unreadable_rows", cause, action=f"set aside in {Path(name).stem}.unreadable.txt")
            for path in retention.supersede(checkpoints, found.path if found else None, step):
                self._record.say(f"set aside, since its step will be written again: {path}")
        except OSError as error:
            raise not_written(f"run.out: {error.filename or self._folder}", error) from None

    def _report_resume(self, found: FoundCheckpoint) -> None:
        saved, ranks, stage = found.manifest, self._ranks.world_size, self._student.stage
        self._record.say(f"resumes from {found.path} (step {saved.step}, attempt {self._attempt})")
        if (saved.world_size, saved.stage) != (ranks, stage):
            self._record.say(
                f"the checkpoint is of {saved.world_size} ranks at ZeRO stage {saved.stage}, this run has"
                f" {ranks} at stage {stage}"
            )
        now = asdict(settings.plan_batch(self._config.batch, ranks))
        before = found.small.get("batch")
        if isinstance(before, dict) and before != now:
            was = f"{saved.world_size} ranks x {before.get('local')}, {before.get('micro')} at a time,"
            self._record.say(
                f"batch arithmetic: {self._config.batch.global_size} = {was} there,"
                f" = {ranks} ranks x {now['local']}, {now['micro']} at a time, now"
            )
        for kind, cause, action in found.notes:
            self._record.say(f"{kind}: {cause}; {action}")
            if self._ranks.is_main:
                self._record.incident(kind, cause, action=action)
