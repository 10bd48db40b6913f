"""The keys of `guards`, `ownership`, `preemption` and `watchdog`."""

import re
from dataclasses import dataclass

SPIKE_POLICIES = ("log", "skip", "rewind")


@dataclass
class GuardsConfig:
    """What makes the run skip a step, and what makes it stop itself (exit code 3)."""

    max_skipped: int = 10
    """After so many skipped steps in a row the run stops itself, naming rank, step and sample ids."""
    spike: str = "log"
    """A loss that leaps: log (recorded only) | skip (the step is skipped) | rewind (back to the last checkpoint)."""
    spike_window: int = 100
    """Losses of applied steps that a loss is compared with; nothing is a spike before there are so many. Where an
    objective begins (loss.NAME.start) or a mask's schedule keeps another number of tokens, they are counted anew."""
    spike_deviations: float = 8.0
    """A spike is this many deviations (1.4826 median absolute ones) above the window's median."""
    max_rewinds: int = 3
    """With spike=rewind: rewinds after which the next spike stops the run."""

    def __post_init__(self) -> None:
        if self.spike not in SPIKE_POLICIES:
            raise ValueError(f"guards.spike: {self.spike!r} is none of {', '.join(SPIKE_POLICIES)}")
        for name, least in (("max_skipped", 1), ("spike_window", 2), ("max_rewinds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"guards.{name}: {getattr(self, name)} is below {least}")
        if self.spike_deviations <= 0:
            raise ValueError(f"guards.spike_deviations: {self.spike_deviations} is not above 0")


@dataclass
class OwnershipConfig:
    """How a run's folder is kept to one trainer."""

    heartbeat_s: float = 5.0
    """RUN/owner.json is renewed so often."""
    stale_s: float = 60.0
    """An owner whose heartbeat stopped for so long is gone; another start takes the folder over."""

    def __post_init__(self) -> None:
        if self.heartbeat_s <= 0:
            raise ValueError(f"ownership.heartbeat_s: {self.heartbeat_s} is not above 0")
        if self.stale_s < 3 * self.heartbeat_s:
            raise ValueError(f"ownership.stale_s: {self.stale_s} is below three heartbeats of {self.heartbeat_s}")


@dataclass
class PreemptionConfig:
    """How the run stops when it is asked to."""

    forced_exit_s: float = 600.0
    """After a signal: a rank that has not saved and left within so many seconds prints its stacks and ends."""
    before_limit_s: float = 120.0
    """The run saves and stops so long before run.time_limit or the Slurm job's end (at most a tenth of the time)."""

    def __post_init__(self) -> None:
        if self.forced_exit_s <= 0:
            raise ValueError(f"preemption.forced_exit_s: {self.forced_exit_s} is not above 0")
        if self.before_limit_s < 0:
            raise ValueError(f"preemption.before_limit_s: {self.before_limit_s} is below 0")


@dataclass
class WatchdogConfig:
    """When a silent rank counts as hanging."""

    step_timeout_s: float | None = 300.0
    """A step or a wait for data that takes longer than this is a hang: all stacks are kept, the run ends. null: off."""
    phase_timeout_s: float = 3600.0
    """The same for what takes longer: start, first step, resume, save, evaluation, what engine.compile compiles."""

    def __post_init__(self) -> None:
        for name in ("step_timeout_s", "phase_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"watchdog.{name}: {value} is not above 0")


def read_duration(text: str, key: str = "run.time_limit") -> float:
    """Seconds in `D-HH:MM:SS` or `HH:MM:SS`. Raises ValueError, naming the key.

    A bare number is refused: yaml reads an unquoted 10:00:00 as one, of seconds, and sbatch takes one for minutes.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    if not match:
        raise ValueError(f"{key}: {text!r} is no duration; write 'HH:MM:SS' or 'D-HH:MM:SS', in quotes in a yaml")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{key}: {text!r} is no time at all")
    return float(total)
