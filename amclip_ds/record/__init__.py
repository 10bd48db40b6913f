"""What a run writes down: metrics.jsonl, eval.jsonl, incidents.jsonl, out.log, TensorBoard, and the live line.

Every file is appended to line by line, and none of them can end the run (backlog.py). A resume calls `supersede`
first, which moves rows past the checkpoint's step to *.superseded.jsonl, so that no step is there twice.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from amclip_ds import display, jsonl, run_files
from amclip_ds.errors import TO_REQUEUE, UserError
from amclip_ds.files import read_json
from amclip_ds.record import tensorboard_events
from amclip_ds.record.backlog import Backlog
from amclip_ds.record.trackers import OPEN, Tracker
from amclip_ds.record.trackers import run_id as run_id
from amclip_ds.redact import redact
from amclip_ds.signals import STOP_FILE

CLASSES = ("per_class", "confusions", "confusion_matrix")  # of an evaluation: kept in eval_classes.jsonl
HEADLINE_METRICS = ("acc1", "acc5", "image_retrieval_recall@1", "text_retrieval_recall@1")  # on the screen
TRACKERS = ("tensorboard", *OPEN)


@dataclass
class LogConfig:
    """How often and where to a run reports."""

    every_steps: int = 10
    """A line in metrics.jsonl and on the screen every so many steps (the first and the last step always)."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where curves go: tensorboard (RUN/tensorboard), wandb, trackio (pip install 'amclip_ds[track]'); [] for none."""
    project: str = "amclip_ds"
    """The project at wandb and trackio."""
    pictures_every_steps: int = 1000
    """What the masks keep of the same few images, in RUN/pictures and TensorBoard: every so many steps, with each
    checkpoint by steps (200 of them, evenly, where there are more), at the first step and the last; 0: never."""
    tensorboard: bool = True
    """false: as if log.trackers were without tensorboard."""
    wandb_project: str | None = None
    """As if wandb were in log.trackers, with this project."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"log.every_steps: {self.every_steps} is below 1")
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"log.trackers: {name!r} is none of {', '.join(TRACKERS)}")
        if not self.project:
            raise ValueError("log.project: a name, at wandb and trackio")
        if self.pictures_every_steps < 0:
            raise ValueError(f"log.pictures_every_steps: {self.pictures_every_steps} is below 0 (0 switches it off)")

    def chosen(self) -> dict[str, str]:
        """Tracker -> its project, in one order."""
        chosen = {name: self.project for name in TRACKERS if name in self.trackers}
        if not self.tensorboard:
            chosen.pop("tensorboard", None)
        return chosen | ({"wandb": self.wandb_project} if self.wandb_project else {})


def read_verdict(run: Path) -> dict[str, Any] | None:
    """RUN/exit.json, or None if there is none that can be read."""
    try:
        verdict = read_json(run / run_files.VERDICT, dict)
        return verdict if type(verdict.get("code")) is int else None
    except UserError:
        return None


def is_by_file(verdict: dict[str, Any]) -> bool:
    """Whether a STOP file ended the run: a person's wish, which no requeue follows."""
    return verdict["code"] == TO_REQUEUE and str(verdict.get("reason", "")).startswith(STOP_FILE)


def evaluation_lines(rows: Iterable[dict[str, Any]]) -> dict[str, bytes]:
    """File of the run -> its lines of some evaluations: eval.jsonl has the numbers, eval_classes.jsonl each class's
    hits and total and what was taken for what, under the same step, weights, dataset and task."""
    lines: dict[str, bytes] = {}
    for row in rows:
        short = {key: value for key, value in row.items() if key not in CLASSES}
        lines[run_files.EVALUATIONS] = lines.get(run_files.EVALUATIONS, b"") + jsonl.encode(short)
        if "per_class" in row:
            kept = {key: row[key] for key in (*run_files.EVALUATION, *CLASSES) if key in row and key != "metrics"}
            lines[run_files.CLASSES] = lines.get(run_files.CLASSES, b"") + jsonl.encode(kept)
    return lines


def supersede(folder: Path, step: int) -> dict[str, int]:
    """Sets aside what a resume from `step` writes again, and lines that are no rows. Rank 0 only. Raises OSError.

    Returns the files with such lines, and how many each.
    """
    counts = {name: jsonl.supersede(folder / name, step) for name in run_files.STEPPED}
    return {name: count for name, count in counts.items() if count}


def _term(key: str) -> str:
    """How the greppable line calls a term of the loss; empty for what is none."""
    name = key.removeprefix("loss_") if key.startswith("loss_") else ""
    return name.upper() if len(name) <= 3 else name.capitalize()


class Record:
    """A run's recorder, which cannot end the run: see backlog.py. On ranks other than 0 only incidents are written.

    folder: the run's folder, existing. total_steps, samples_per_epoch, checkpoint_every (steps): for
    what the progress line needs.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        total_steps: int,
        samples_per_epoch: int,
        first_step: int = 0,
        run_config: dict[str, Any] | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        self.folder, self.config, self.rank, self.world_size, self.attempt = folder, config, rank, world_size, attempt
        self.total_steps, self.samples_per_epoch = total_steps, samples_per_epoch
        self._checkpoint_every = checkpoint_every
        self.is_main = rank == 0
        self.step = self._first_step = first_step
        self._backlog = Backlog(lambda cause, outcome: self.incident("record_held", cause, action=outcome))
        self._events = folder / "tensorboard" / tensorboard_events.file_name()
        self._trackers: list[Tracker] = []
        self._progress: Any = None
        if self.is_main:
            screen = display.console()
            if screen.is_terminal and not screen.is_dumb_terminal:  # a dumb one shows lines, as a pipe does
                self._open_progress(first_step, screen)
            self._trackers = [
                Tracker(name, project, folder, run_config or {}, self.incident, self.say)
                for name, project in config.chosen().items()
                if name in OPEN
            ]

    def is_due(self, step: int) -> bool:
        """Whether this step is one of those reported."""
        return step % self.config.every_steps == 0 or step == self.total_steps or step == 1

    def say(self, text: str) -> None:
        """One line on the screen and in out.log. Rank 0 only; others are silent."""
        if not self.is_main:
            return
        text = redact(text)
        self._note(text)
        if self._progress:
            self._progress.console.print(display.printable(text), highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def metrics(self, row: dict[str, Any], note: str = "") -> None:
        """One step's numbers: metrics.jsonl, the trackers, and open_clip's greppable line with `note` after it."""
        self.step = row["step"]
        if not self.is_main:
            return
        self._append(run_files.METRICS, row)
        self._track(row["step"], row)
        left = self._time_left(row)
        line = " | ".join(part for part in (self._line(row), note, left) if part)
        if self._progress:
            self._note(line)
            memory = row.get("peak_memory_gib")
            reported = [
                f"loss {row['loss']:.3f}",
                f"{row['samples_per_s']:.0f} samples/s",
                f"{memory:.1f} GiB" if memory else "",
                left,
                note.partition(" ")[0],
            ]
            self._progress.update(self._task, completed=row["step"], note=", ".join(filter(None, reported)))
        else:
            self.say(line)

    def sample_ids(self, step: int, ids: list[int]) -> None:
        """The sample ids of one step, in global order."""
        if self.is_main:
            self._append(run_files.SAMPLE_IDS, {"step": step, "ids": ids})

    def masks(self, row: dict[str, Any], jpeg: bytes, width: int, height: int) -> None:
        """What the masks keep at a step: pictures/masks.jsonl, and the picture in TensorBoard."""
        self._append(run_files.MASKS, row)
        if "tensorboard" in self.config.chosen():
            event = tensorboard_events.image(row["step"], "masks", jpeg, width, height)
            self._backlog.append(self._events, event, head=tensorboard_events.head(self._first_step + 1))

    def evaluation(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of an evaluation: eval.jsonl and the trackers."""
        for row in rows if self.is_main else ():
            for name, lines in evaluation_lines([row]).items():
                self._backlog.append(self.folder / name, lines)
            shown = {name: row["metrics"][name] for name in row["metrics"] if name in HEADLINE_METRICS}
            reported = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
            self.say(f"Eval Step: {row['step']} {row['dataset']} {row['weights']}: {reported}")
            prefix = f"eval/{row['weights']}/{row['dataset']}"
            self._track(row["step"], {f"{prefix}/{name}": value for name, value in row["metrics"].items()})

    def incident(self, kind: str, cause: str, *, shard: str = "", key: str = "", action: str = "") -> None:
        """Something that should not have happened, and what was done about it. Any rank."""
        self._append(
            run_files.INCIDENTS,
            {
                "time": round(time.time(), 3),
                "attempt": self.attempt,
                "step": self.step,
                "rank": self.rank,
                "kind": kind,
                "shard": shard,
                "key": key,
                "cause": cause,
                "action": action,
            },
        )

    def incidents(self, rows: Iterable[dict[str, str]]) -> None:
        """Samples that were skipped or damaged, as the ledger returns them: kind, shard, key, cause. Any rank."""
        for row in rows:
            self.incident(**{"action": "replaced by another sample"} | row)  # type: ignore[arg-type]

    def replace(self, path: Path, text: str) -> None:
        """Makes `text` the whole content of a small file of the run, when the disk takes it."""
        self._backlog.replace(path, text)

    def close(self) -> None:
        """Ends the live line, and waits a little for what the disk has not taken."""
        while self._trackers:
            self._trackers.pop().finish()
        self._close_progress()
        self._backlog.close()

    def last_word(self, text: str) -> None:
        """One line below all others, the live line too."""
        self._close_progress()
        self.say(text)

    def _close_progress(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, row: dict[str, Any]) -> str:
        terms = " ".join(f"{name}: {row[key]:.4f}" for key in row if (name := _term(key)))
        cost = ""
        if "tflops" in row:
            cost = f" TFLOP/s: {row['tflops']:.3g} MFU: {row['mfu']:.1%} Memory: {row['peak_memory_gib']:.2f} GiB"
        seen = row["samples_seen"] % self.samples_per_epoch
        return (
            f"Train Epoch: {row['epoch']}"
            f" [{seen}/{self.samples_per_epoch} ({100 * seen / self.samples_per_epoch:.0f}%)]"
            f" Step: {row['step']}/{self.total_steps} Data (t): {row['data_wait_s']:.3f} Batch (t): {row['step_s']:.3f}"
            f" {row['samples_per_s']:.1f}/s, {row['samples_per_s'] / self.world_size:.1f}/s/gpu LR: {row['lr']:.6f}"
            f" Logit Scale: {row['logit_scale']:.3f} {terms} Loss: {row['loss']:.4f}{cost}"
        )

    def _time_left(self, row: dict[str, Any]) -> str:
        """`ETA 3 h 5 min, checkpoint in 41 s`: at the speed of the row, without saves and evaluations."""
        left = self.total_steps - row["step"]
        if left <= 0:
            return ""
        reported = f"ETA {display.duration(left * row['step_s'])}"
        if self._checkpoint_every:
            until = min(left, self._checkpoint_every - row["step"] % self._checkpoint_every)
            reported += f", checkpoint in {display.duration(until * row['step_s'])}"
        return reported

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self._backlog.append(self.folder / name, jsonl.encode(row))

    def _note(self, text: str) -> None:
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {display.printable(text)}\n"
        self._backlog.append(self.folder / run_files.LOG, line.encode("utf-8", "backslashreplace"))

    def _track(self, step: int, values: dict[str, Any]) -> None:
        """The numbers among the values, for TensorBoard and W&B."""
        numbers = {
            name: float(value) for name, value in values.items() if isinstance(value, int | float) and name != "time"
        }
        if "tensorboard" in self.config.chosen():
            event = tensorboard_events.scalars(step, numbers)
            self._backlog.append(self._events, event, head=tensorboard_events.head(self._first_step + 1))
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def _open_progress(self, first_step: int, screen: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=screen,
        )
        self._progress.start()
        self._task = self._progress.add_task("train", total=self.total_steps, completed=first_step, note="first step")
