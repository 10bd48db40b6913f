"""The signals that ask a run to save and stop, and how what runs beside its ranks is kept from hearing them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A save and stop: a scheduler's warning, its end, Ctrl-C, the end of the terminal."""

STOP_FILE = "a STOP file"
"""How the reason of a stop begins that a person asked for with a file: such a run is not requeued."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of STOPPING that this process is to hear. Under nohup the end of the terminal is none of them."""
    return tuple(n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """While it lasts, STOPPING is held back in this thread. A process started meanwhile inherits that for good: it
    hears none of them, and its parent decides when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
