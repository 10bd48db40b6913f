"""Named places where a test may have this process killed: every phase of a save and of a purge passes through one.

Nothing is armed unless a test arms it. `PHASES` lists the names in the order a save reaches them.
"""

import os
import signal
from collections.abc import Callable

PHASES = (
    "agree",
    "snapshot",
    "make_folder",
    "write_begin",
    "write_middle",
    "write_fsync",
    "write_end",
    "gathered",
    "manifest_written",
    "before_rename",
    "after_rename",
    "latest_written",
    "purge_renamed",
    "purge_middle",
    "done",
)
ARMED: set[str] = set()
INSTEAD: dict[str, Callable[[], None]] = {}
"""What a test does at a place instead of dying there (fills the disk, say)."""
VICTIMS: list[int] = []
"""Processes that die with this one, before it: a writer that is killed takes its trainer along."""


def reached(name: str) -> None:
    """Ends this process, as SIGKILL would, if a test armed `name`."""
    if name in INSTEAD:
        INSTEAD[name]()
    if name in ARMED:
        for pid in (*VICTIMS, os.getpid()):
            os.kill(pid, signal.SIGKILL)
