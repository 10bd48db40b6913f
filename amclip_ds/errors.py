"""The ways a command ends early, and the exit codes, which are defined here alone (README, "Exit codes")."""

from typing import Any

from amclip_ds.redact import redact

DONE = 0
FAULT = 1
"""Of ours, or of the machine."""
MISTAKE = 2
"""The user's."""
STOPPED_ITSELF = 3
TO_REQUEUE = 75
"""Stopped from outside, after a committed checkpoint: started again, it continues."""
FROM_A_FILE = "amclip_plugin_"  # how the module of a plug-in's file is called, so that it takes no other's name
INTERRUPTED = 130
"""Before there was anything to save."""


class AmclipError(Exception):
    """An ending that is reported as one line, without a traceback."""

    exit_code = FAULT
    is_shared = False
    """Whether every rank of a run meets it alike, so that rank 0 reports it for all."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(str(message)))


class UserError(AmclipError):
    """The user's mistake: the message is one line that names the key or file and the fix."""

    exit_code = MISTAKE


class NotRead(UserError):
    """A file that the machine does not give just now, its file system being in trouble: tolerated where an unreadable
    file is, and else code 1, since the same command may read it later."""

    exit_code = FAULT


class SettingsError(UserError):
    """A mistake in a recipe or a key=value word, which all ranks read alike."""

    is_shared = True


class LocalSettingsError(SettingsError):
    """One that only this machine may have: a file or an environment variable that is missing here."""

    is_shared = False


class RunStopped(AmclipError):
    """The run stopped itself (guards, data limits): requeueing would only repeat it."""

    exit_code = STOPPED_ITSELF
    is_shared = True


class LocalRunStopped(RunStopped):
    """One that a single rank may meet, in its part of the data."""

    is_shared = False


class Preempted(AmclipError):
    """Stopped by a signal or a limit, after a committed checkpoint: requeue."""

    exit_code = TO_REQUEUE
    is_shared = True


def name_of(part: Any) -> str:
    """A function or class as a line about it names it, with its module: `mine.Centre.per_sample`."""
    module = getattr(part, "__module__", type(part).__module__)
    return f"{module.removeprefix(FROM_A_FILE)}.{getattr(part, '__qualname__', type(part).__qualname__)}"


def in_one_line(error: object, limit: int | None = None) -> str:
    """What an error says, its lines joined, `limit` characters at most."""
    return " ".join(str(error).split())[:limit]
