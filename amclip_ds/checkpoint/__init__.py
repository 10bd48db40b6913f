"""Checkpoints that cannot be lost: a folder per step, hashed, committed by one rename, loaded at any world and stage.

    ranks = Ranks(config.checkpoint.timeout_s)                                # all below is collective
    found = load.find(folder / "checkpoints", "auto", fallback=False, ranks=ranks)    # verified; None: a fresh start
    load.fill(found, state, ranks)                                            # writes into the state's own tensors
    saver = save.Saver(folder / "checkpoints", config.checkpoint, ranks)      # one per run, closes with the run
    saver.save(step, state)                                                   # returns after the copy

`state` is a `state.CheckpointState`: this rank's Shards of masters, moments and EMA by parameter name, replicated
buffers, and a small json-able dict (counters, data cursor, guards). manifest.py has the format's rules
(docs/checkpoint-format.md), save.py writes, background.py lets a process write, load.py reads, retention.py deletes,
drift.py compares configs. What one run does with all this is run_checkpoints.py's, above this package. Every module
but this one is imported where it is used, since the settings below are read by every command.
"""

from dataclasses import dataclass, field


@dataclass
class CheckpointConfig:
    """When the run saves, how, and what it keeps."""

    every_steps: int | None = 1000
    """A checkpoint every so many steps; null: by the clock alone. The last step is always saved."""
    every_minutes: float | None = 15.0
    """A checkpoint whenever so many minutes have passed since the last one; null: by steps alone."""
    keep_last: int = 2
    """The newest so many stay."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this stay for good; null: none but the newest and the pinned ones."""
    asynchronous: bool = True
    """True: training waits only for a copy into host memory, a background process writes; False: it waits for the
    disk."""
    fallback: bool = False
    """True: where the newest checkpoint is damaged, `--resume auto` takes the newest valid one and records it."""
    timeout_s: float = 600.0
    """A save that takes longer than this has failed, on every rank."""
    allow_drift: list[str] = field(default_factory=list)
    """Keys that may differ from the checkpoint's although they change training results (`[optim.lr]`); recorded."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last: {self.keep_last} is below 1")
        for name in ("every_steps", "every_minutes", "keep_every_steps", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"checkpoint.{name}: {value} is not above 0 (null switches it off)")
