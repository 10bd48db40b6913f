"""Processes that claim one folder at the same moment: `python claimants.py SLOW`, a round a line of standard input.

A line is {"folder", "at", "job", "restart"}: who owns a folder leaves it and claims this one; {}: it stays as it is.
Each answers {"owns": true | false, "said"}.
SLOW: seconds that a call to the file system may take at most. Every listing is then as old as the call is long, every
creation, rename and removal happens somewhere within it, as over a network.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amclip_ds.errors import UserError
from amclip_ds.resilience import ownership
from amclip_ds.resilience.config import OwnershipConfig

CALLS = ("listdir", "scandir", "open", "replace", "unlink", "stat")
CONFIG = OwnershipConfig(heartbeat_s=0.02, stale_s=60.0)


def slow_down(longest_s: float) -> None:
    """Puts a sleep of any length before and after each call."""
    dice = random.Random(os.getpid())

    def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **options: Any) -> Any:
            time.sleep(dice.random() * longest_s)
            try:
                return call(*args, **options)
            finally:
                time.sleep(dice.random() * longest_s)

        return slow

    for name in CALLS:
        setattr(os, name, slowly(getattr(os, name)))


def main() -> None:
    assert "torch" not in sys.modules
    held: ownership.Owner | None = None
    for line in sys.stdin:
        task, said = json.loads(line), ""
        if "folder" in task:
            if held is not None:
                held.release()
                held = None
            time.sleep(max(0.0, task["at"] - time.monotonic()))
            try:
                held = claim(Path(task["folder"]), task["job"], task["restart"])
            except UserError as error:
                said = str(error)
        print(json.dumps({"owns": held is not None and held.claim.holds(), "said": said}), flush=True)


def claim(folder: Path, job: str, restart: int) -> ownership.Owner:
    return ownership.claim(folder, CONFIG, job=job, restart=restart, say=lambda _: None)


if __name__ == "__main__":
    if float(sys.argv[1]):
        slow_down(float(sys.argv[1]))
    main()
