"""Guards: a loss that is not finite, or that leaps, is seen by all ranks before its gradient exists, and decided alike.

    loss -> admit (all ranks see all ranks' losses) -> backward -> step, or none -> account (count, record, stop)

The verdict is made on the device, so that the host need not wait there for the forward pass: what is refused gets a
gradient that is not finite, and such a one the engine's step refuses, on all ranks (engine/student.py). It does so too
where the loss was finite; `account` counts both the same way. Whatever is skipped advances neither the weights nor the
average nor the schedules.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amclip_ds.errors import RunStopped
from amclip_ds.host_copies import begin_download
from amclip_ds.model.features import Losses
from amclip_ds.ranks.collectives import gather_objects, gather_row, my_rank
from amclip_ds.resilience.config import GuardsConfig
from amclip_ds.run_files import LOSS_SPIKE, NON_FINITE_GRADIENT, NON_FINITE_LOSS

TO_DEVIATION = 1.4826  # a median absolute deviation times this is a normal's standard deviation
LEAST_DEVIATION = 0.01  # of the median: a loss that hardly moves must not make every ripple a spike
IDS_IN_A_LINE = 8


class RewindAsked(RunStopped):
    """guards.spike=rewind met a spike: reload the last checkpoint and continue behind the batches consumed so far.

    The caller loads the checkpoint's weights, moments, average and counters, keeps its place in the data (reading the
    same batches again would bring the same spike), and gives its Guards the loaded state. Raised on every rank alike;
    uncaught, it ends the run as any RunStopped does.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Guards:
    """Every rank holds one, all with the same state: it follows from what all ranks have exchanged.

    incident: record.Record.incident, for what a rank has to say about its own samples.
    """

    def __init__(self, config: GuardsConfig, incident: Callable[..., None] | None = None) -> None:
        self.config = config
        self.window: list[float] = []
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.rewinds = 0
        self._incident = incident or (lambda *words, **more: None)
        self._unread: Callable[[], Tensor] | None = None
        self._is_finite: Tensor | None = None
        self._reason: str | None = None
        self._spike: str | None = None
        self._mean = math.nan
        self._bad_ranks: list[int] = []

    def admit(self, losses: Losses) -> Tensor:
        """A scalar that the loss is to be multiplied by before its gradient is taken, the same on every rank: 1, or NaN
        where the step must not be made. Collective: every rank must call.

        losses: of this rank. Its features show which of its samples are not finite; the terms cannot, since
        one bad sample reaches every rank's through the gathered negatives.
        """
        self._is_finite = finite_rows(losses)
        total = losses.total.detach().double().reshape(())
        rows = gather_row(torch.stack([total, self._is_finite.logical_not().sum().double()]))
        limit = self._limit() if self.config.spike != "log" else math.inf
        is_accepted = rows.isfinite().all() & (rows[:, 1] == 0).all() & (rows[:, 0].mean() <= limit)
        factor = torch.ones_like(total).masked_fill(~is_accepted, math.nan)
        self._unread = begin_download(torch.cat([factor[None], rows.flatten()]))
        return factor.to(losses.total.dtype)

    def forget(self) -> None:
        """The losses so far say nothing of those to come, as where an objective begins: each of these would be a spike,
        and, were it skipped, the next one too, for ever."""
        self.window = []

    @property
    def admitted(self) -> bool:
        """What `admit` decided last."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why the current step is not to be applied; None: it is. The first to ask after `admit` waits for it."""
        if self._unread is not None:
            self._read(self._unread().tolist())
            self._unread = None
        return self._reason

    def _read(self, numbers: list[float]) -> None:
        factor, totals, counts = numbers[0], numbers[1::2], numbers[2::2]
        self._bad_ranks = [rank for rank, count in enumerate(counts) if count]
        self._mean = sum(totals) / len(totals)  # in rank order on every rank: the same bits
        self._reason = self._spike = None
        if not all(math.isfinite(value) for value in totals) or self._bad_ranks:
            ranks = self._bad_ranks or [rank for rank, value in enumerate(totals) if not math.isfinite(value)]
            self._reason = f"non-finite loss, from {_listed('rank', ranks)}"
            self._bad_ranks = ranks
        elif math.isnan(factor) or (self.config.spike == "log" and self._mean > self._limit()):
            self._spike = self._describe_spike()
            self._reason = self._spike if math.isnan(factor) else None

    def account(self, step: int, applied: bool, sample_ids: Tensor) -> None:
        """Counts and records what became of `step`; the same on every rank. Collective: every rank must call.

        applied: what the engine says. sample_ids [B]: this rank's. Raises RunStopped after guards.max_skipped skipped
        steps in a row, RewindAsked at a spike under spike=rewind.
        """
        reason = self.reason
        if applied:
            self.window = [*self.window, self._mean][-self.config.spike_window :]
            self.skipped_in_a_row = 0
            if self._spike:
                self._record(LOSS_SPIKE, self._spike, step, sample_ids, "logged")
            return
        if self._spike and self.config.spike == "rewind":
            self._rewind(step, sample_ids)
        self.skipped += 1
        self.skipped_in_a_row += 1
        kind = LOSS_SPIKE if self._spike else NON_FINITE_LOSS if reason else NON_FINITE_GRADIENT
        reason = reason or "non-finite gradient of a finite loss, summed over the ranks"
        self._record(kind, reason, step, sample_ids, "skipped on all ranks")
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise RunStopped(
                f"guards.max_skipped: {self.skipped_in_a_row} steps in a row were skipped; the last: step {step},"
                f" {reason}; sample ids {self._name_samples(sample_ids)}; incidents.jsonl lists every one"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain numbers."""
        return {
            "window": list(self.window),
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped": self.skipped,
            "rewinds": self.rewinds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a checkpoint's state over. Rewinds are never forgotten, or a spike could rewind for ever."""
        self.window = [float(value) for value in state["window"]][-self.config.spike_window :]
        self.skipped_in_a_row, self.skipped = int(state["skipped_in_a_row"]), int(state["skipped"])
        self.rewinds = max(self.rewinds, int(state["rewinds"]))

    def _limit(self) -> float:
        """The mean loss above which a step is a spike; infinite until the window is full."""
        if len(self.window) < self.config.spike_window:
            return math.inf
        middle = statistics.median(self.window)
        deviation = TO_DEVIATION * statistics.median(abs(value - middle) for value in self.window)
        return middle + self.config.spike_deviations * max(deviation, LEAST_DEVIATION * abs(middle))

    def _describe_spike(self) -> str:
        middle = statistics.median(self.window)
        return f"loss {self._mean:.6g} leapt over {self._limit():.6g} (median of {len(self.window)} steps {middle:.6g})"

    def _rewind(self, step: int, sample_ids: Tensor) -> None:
        if self.rewinds >= self.config.max_rewinds:
            raise RunStopped(f"guards.max_rewinds: step {step}: {self._spike}, after {self.rewinds} rewinds")
        self.rewinds += 1
        self._record(LOSS_SPIKE, str(self._spike), step, sample_ids, "rewind to the last checkpoint")
        raise RewindAsked(f"guards.spike=rewind: step {step}: {self._spike}; no checkpoint to go back to", step)

    def _record(self, kind: str, cause: str, step: int, sample_ids: Tensor, action: str) -> None:
        """An incident of this rank, if it is among the suspects (where nobody can be distinguished, all are)."""
        rank = my_rank()
        if not self._bad_ranks or rank in self._bad_ranks:
            ids = self._suspects(sample_ids)
            self._incident(kind, f"step {step}: {cause}", key=",".join(map(str, ids)), action=action)

    def _suspects(self, sample_ids: Tensor) -> list[int]:
        """This rank's samples whose embeddings are not finite; all of them where none can be distinguished."""
        ids = sample_ids.tolist()
        bad = (
            []
            if self._is_finite is None
            else [row for row, is_finite in enumerate(self._is_finite.tolist()) if not is_finite]
        )
        return [ids[row] for row in bad] or ids

    def _name_samples(self, sample_ids: Tensor) -> str:
        """`rank 1: 17, 40; rank 3: 5`. Collective: every rank must call."""
        parts = []
        for rank, ids in enumerate(gather_objects(self._suspects(sample_ids))):
            if not self._bad_ranks or rank in self._bad_ranks:
                shown = ", ".join(map(str, ids[:IDS_IN_A_LINE]))
                more = f" and {len(ids) - IDS_IN_A_LINE} more" if len(ids) > IDS_IN_A_LINE else ""
                parts.append(f"rank {rank}: {shown}{more}")
        return "; ".join(parts)


def finite_rows(losses: Losses) -> Tensor:
    """[B] bool: this rank's samples whose features are all finite."""
    finite = losses.cls.isfinite().all(-1).all(0)
    for eot in losses.eot.values():
        finite = finite & eot.isfinite().all(-1)
    return finite


def _listed(word: str, numbers: list[int]) -> str:
    return f"{word}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
