"""What the end-to-end tests run on forked ranks: a command as a user types it, with what it printed."""

import contextlib
import errno
import io
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from amclip_ds.cli import main


def command(argv: list[str]) -> tuple[int, str]:
    """Runs `amclip ARGV` in this process. Returns the exit code and everything it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(argv)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
    return code, printed.getvalue()


def asked_in_vain(argv: list[str], of: str, uncompiled: str) -> list[str]:
    """The command, with a part on rank 1 that began to run uncompiled for that reason. Returns what this rank asked of
    a path, by any call that a start or a save makes, while nothing was there."""
    from amclip_ds.engine.compile import FALLEN_BACK

    found: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *args: Any, **words: Any) -> Any:
            try:
                return call(path, *args, **words)
            except FileNotFoundError:
                if str(path) == of:
                    found.append(name)
                raise

        return noted

    for name in ("stat", "lstat", "statvfs", "listdir", "scandir", "open"):
        setattr(os, name, noting(name, getattr(os, name)))
    if os.environ["RANK"] == "1":
        FALLEN_BACK.append(uncompiled)
    code, printed = command(argv)
    assert code == 0, printed
    return found


def rewound(argv: list[str], wait_s: float) -> tuple[int, str]:
    """The command; its saves fail from the second on until a rewind, whose reading of the checkpoint takes so long."""
    from amclip_ds.checkpoint import failpoints, load

    verified, commits, is_behind = load.verified, itertools.count(), False

    def full() -> None:
        if next(commits) and not is_behind:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def slow(*words: Any) -> Any:
        nonlocal is_behind
        is_behind = True
        time.sleep(wait_s)
        return verified(*words)

    failpoints.INSTEAD["manifest_written"], load.verified = full, slow
    return command(argv)


def blocked_loader(argv: list[str], rank: int, after: int) -> None:
    """The command, with a loader that gives nothing more on one rank after so many batches."""
    from amclip_ds.data.loader import TrainingData

    batches = TrainingData.batches

    def blocking(self: TrainingData, cursor: dict | None) -> Iterator:
        for number, batch in enumerate(batches(self, cursor)):
            while number >= after and os.environ["RANK"] == str(rank):
                time.sleep(1)
            yield batch

    TrainingData.batches = blocking  # type: ignore[method-assign]
    main(argv)


def endless_step(argv: list[str], rank: int, after: int) -> None:
    """The command, with a step that one rank never leaves."""
    from amclip_ds.masks import selection

    select, calls = selection.select, itertools.count()

    def endless(*words: Any, **named: Any) -> Any:
        while next(calls) >= after and os.environ["RANK"] == str(rank):
            time.sleep(1)
        return select(*words, **named)

    selection.select = endless
    main(argv)


def signal_in_evaluation(argv: list[str], rank: int, batch: int) -> tuple[int, str, int]:
    """The command; as one rank encodes its so many-th batch of images in an evaluation, it gets SIGUSR1. Returns too
    how many batches of images this rank has encoded."""
    from amclip_ds.evaluate.encoder import TowerEncoder

    image, calls = TowerEncoder.image, itertools.count(1)

    def signalled(self: TowerEncoder, *images: Any) -> Any:
        if next(calls) == batch and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)  # for the thread that notes it
        return image(self, *images)

    TowerEncoder.image = signalled  # type: ignore[method-assign]
    return *command(argv), next(calls) - 1
