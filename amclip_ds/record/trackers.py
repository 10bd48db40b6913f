"""Trackers of other houses beside TensorBoard: Weights & Biases and trackio. None of them can end or delay a run.

A run keeps its name at a tracker in every attempt (RUN/run_id), so that resumed curves continue. Without a network, and
without a word of the user on it, W&B keeps its files in RUN/wandb; trackio is local by itself.
"""

import re
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from amclip_ds.errors import in_one_line
from amclip_ds.files import is_regular, read_text, write_atomically

REACHED_WITHIN_S = 3.0
Say = Callable[[str], None]


def run_id(folder: Path) -> str:
    """What names this run and no other, in every attempt: kept in RUN/run_id, so that it outlives a rename.

    Two runs of one recipe, in folders of one name, must not continue in each other's place at a tracker. Rank 0.
    """
    file = folder / "run_id"
    if not is_regular(file):
        first = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', folder.name)[:80]}-{secrets.token_hex(4)}"
        old = folder.name if (folder / "wandb").is_dir() else first  # begun before there were such files
        write_atomically(file, old + "\n")
    return read_text(file).strip()


class Tracker:
    """A run at a tracker. Whatever fails there is an incident, once, and costs what it failed on.

    incident(kind, cause, action=...): where it is recorded. say: prints for the user.
    """

    def __init__(
        self, name: str, project: str, folder: Path, run_config: dict[str, Any], incident: Callable[..., None], say: Say
    ) -> None:
        self._name, self._incident = name, incident
        self._is_failing = False
        self._run: Any = None

        def begin() -> None:
            self._run = OPEN[name](project, folder, run_config, say)

        self._attempt(begin)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """One step's numbers."""
        if self._run is not None:
            self._attempt(lambda: self._run.log(numbers, step=step))

    def finish(self) -> None:
        """Ends the run there."""
        if self._run is not None:
            self._attempt(self._run.finish)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._is_failing = False
        except Exception as error:  # a library of another house, over a network
            if not self._is_failing:
                cause = f"{type(error).__name__}: {in_one_line(error, 300)}"
                print(f"amclip: {TITLES[self._name]} failed ({cause}); training continues", file=sys.stderr, flush=True)
                self._incident(self._name, cause, action="training continues")
            self._is_failing = True


def _open_wandb(project: str, folder: Path, run_config: dict[str, Any], say: Say) -> Any:
    import wandb

    how: dict[str, Any] = {}
    if why := _why_offline(wandb):
        how["mode"] = "offline"
        say(f"wandb: {why}: curves are kept in {folder}/wandb; later: wandb sync {folder}/wandb/offline-run-*")
    return wandb.init(
        project=project, name=folder.name, dir=folder, id=run_id(folder), resume="allow", config=run_config, **how
    )


def _why_offline(wandb: Any) -> str:
    """Why W&B is not to be asked for; empty where it can be, or where the user has said how (WANDB_MODE)."""
    setup = getattr(wandb, "setup", None)
    settings = setup().settings if setup else None
    if settings is None or getattr(settings, "mode", "online") != "online":
        return ""
    server = urlsplit(settings.base_url)
    if not is_reachable(server.hostname or "", server.port or (443 if server.scheme == "https" else 80)):
        return f"no way to {server.hostname}"
    return ""


def is_reachable(host: str, port: int) -> bool:
    """Whether a server takes connections from here."""
    try:
        with socket.create_connection((host, port), REACHED_WITHIN_S):
            return True
    except OSError:
        return False


def _open_trackio(project: str, folder: Path, run_config: dict[str, Any], say: Say) -> Any:
    import trackio

    run = trackio.init(project=project, name=run_id(folder), resume="allow", config=run_config, embed=False)
    say(f"trackio: curves are kept on this machine; trackio show --project {project}")
    return run


OPEN: dict[str, Callable[..., Any]] = {"wandb": _open_wandb, "trackio": _open_trackio}
TITLES = {"wandb": "Weights & Biases", "trackio": "trackio"}
