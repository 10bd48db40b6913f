"""What a command run inside the test process leaves behind: its plug-ins, what it made of signals, its timer."""

import sys
from collections.abc import Iterator

import pytest

from amclip_ds import plugins
from amclip_ds.errors import FROM_A_FILE
from amclip_ds.masks import MASKS
from amclip_ds.masks.text import TEXT_MASKS
from amclip_ds.objectives import OBJECTIVES
from amclip_ds.resilience import preemption

OWN = [(table, frozenset(table)) for table in (MASKS, TEXT_MASKS, OBJECTIVES)]


@pytest.fixture(autouse=True)
def nothing_stays_of_a_command() -> Iterator[None]:
    """They are the process's: the next test, in whatever order, begins without, and what it starts hears signals."""
    with preemption.restoring_signals():  # also those that `amclip train --procs 2` holds back for its ranks
        yield
        if preemption._listener is not None:
            preemption._listener.close()
            preemption._listener = None
    forget_plugins()


def forget_plugins() -> None:
    """As a process that has loaded none."""
    loaded = {plugin.module for plugin in plugins.LOADED.values()}
    plugins.LOADED.clear()
    for table, own in OWN:
        for name in set(table) - own:
            del table[name]  # type: ignore[attr-defined]
    for name in [*sys.modules]:
        if name.startswith(FROM_A_FILE) or name.partition(".")[0] in loaded:
            del sys.modules[name]
