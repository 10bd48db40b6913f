"""What a run asks of the shared file system and of the other ranks, counted: a real `train` on forked ranks, two a
node, that saves, and of one that continues it."""

import builtins
import collections
import contextlib
import functools
import io
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

LOOKS = ("stat", "lstat", "scandir", "listdir", "statvfs", "access", "readlink")
CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "chmod", "utime")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "gather",
    "reduce",
    "scatter",
    "barrier",
    "new_group",
    "batch_isend_irecv",
    "all_to_all_single",
)


class Counts:
    """By phase: {what: how often}. `looks` and `changes`: metadata; `opens`; `collectives`; `object_bytes` unpacked."""

    def __init__(self, shared: Path) -> None:
        self.shared, self.phase = str(shared.absolute()), "start"
        self.of: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._lock = threading.Lock()

    def add(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.of[self.phase][what] += count

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def watch(self) -> None:
        """Counts from now on in this process: what it asks of paths in the shared folder, and its collectives."""
        for name in (*LOOKS, *CHANGES):
            kind = "looks" if name in LOOKS else "changes"
            setattr(os, name, self._of_paths(getattr(os, name), kind))
        os.open = self._of_paths(os.open, "opens")  # type: ignore[assignment]
        builtins.open = io.open = self._of_paths(io.open, "opens")  # type: ignore[assignment]
        for name in COLLECTIVES:
            counted = self._always(getattr(distributed_c10d, name))
            setattr(distributed_c10d, name, counted)
            setattr(dist, name, counted)
        for name, everywhere in (("all_gather_object", True), ("gather_object", False)):
            counted = self._of_objects(getattr(distributed_c10d, name), everywhere)
            setattr(distributed_c10d, name, counted)
            setattr(dist, name, counted)

    def _of_paths(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **words: Any) -> Any:
            is_path = args and isinstance(args[0], str | bytes | os.PathLike)
            if is_path and os.fsdecode(args[0]).startswith(self.shared):
                self.add(kind)
            return function(*args, **words)

        return call

    def _always(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **words: Any) -> Any:
            self.add("collectives")
            return function(*args, **words)

        return call

    def _of_objects(self, function: Callable[..., Any], everywhere: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(first: Any, second: Any, *args: Any, **words: Any) -> Any:
            own = second if everywhere else first
            if everywhere or dist.get_rank() == 0:
                self.add("object_bytes", len(pickle.dumps(own)) * dist.get_world_size())
            return function(first, second, *args, **words)

        return call


def counted_run(shared: str, phase: str, steps: int) -> dict[str, dict[str, int]]:
    """This rank's counts of a run to `steps`: by `phase` (start, resume) until the first step, steps, save.

    shared: holds `data`, and `run` where it continues.
    """
    from amclip_ds import config, train
    from amclip_ds.checkpoint.save import Saver

    rank, folder = int(os.environ["RANK"]), Path(shared)
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(rank // 2)}
    socket.gethostname = lambda: f"node{rank // 2}"
    counts = Counts(folder)
    counts.watch()
    step, save = train.train_step, Saver.save

    def counted_step(*args: Any, **words: Any) -> Any:
        counts.phase = "steps"
        return step(*args, **words)

    def counted_save(self: Saver, *args: Any, **words: Any) -> None:
        with counts.during("save"):
            save(self, *args, **words)

    train.train_step, Saver.save = counted_step, counted_save  # type: ignore[assignment,method-assign]
    words = [
        f"run.out={folder / 'run'}",
        f"data.train={folder / 'data' / 'train'}",
        f"run.steps={steps}",
        "batch.global_size=16",
        "batch.per_gpu=16",
        "model.vision.depth=1",
        "model.text.depth=1",
        "checkpoint.every_steps=2",
        "checkpoint.asynchronous=false",
        "checkpoint.allow_drift=[run.steps]",
        "log.trackers=[]",
        "log.pictures_every_steps=0",
        "engine.deepspeed=zero3_fp32.json",
    ]
    counts.phase = phase
    train.train(config.load("aclip-tiny", words), "auto")
    return {phase: dict(of) for phase, of in counts.of.items()}
