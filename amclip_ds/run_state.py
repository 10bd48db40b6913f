"""What a run counts: steps, updates, samples, the place in the data."""

from dataclasses import dataclass, field
from typing import Any

from amclip_ds.data.batch import Batch
from amclip_ds.step import StepResult


@dataclass
class TrainState:
    """Where the run is; with the engines' tensors, all that a resume needs."""

    step: int = 0
    """Batches consumed."""
    updates: int = 0
    """Optimizer steps applied; learning rate and momentum are functions of it."""
    samples_seen: int = 0
    epoch: int = 0
    cursor: dict[str, Any] | None = None
    """Where the stream of batches is."""
    guards: dict[str, Any] = field(default_factory=dict)

    def numbers(self) -> dict[str, int]:
        """The counters of a metrics row."""
        return {"step": self.step, "updates": self.updates, "epoch": self.epoch, "samples_seen": self.samples_seen}

    def advance(self, batch: Batch, result: StepResult, global_batch: int) -> None:
        """Counts a batch that was trained on."""
        self.step += 1
        self.updates += int(result.applied)
        self.samples_seen += global_batch
        self.epoch, self.cursor = batch.epoch, batch.cursor
