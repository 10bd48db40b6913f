"""The ways a command ends early, each with its exit code (README, "Exit codes")."""


class AmclipError(Exception):
    """An ending that is reported as one line, without a traceback."""

    exit_code = 1


class UserError(AmclipError):
    """The user's mistake: the message is one line that names the key or file and the mend."""

    exit_code = 2


class RunStopped(AmclipError):
    """The run stopped itself (guards, data limits): requeueing would only repeat it."""

    exit_code = 3


class Preempted(AmclipError):
    """Stopped by a signal or a limit, after a committed checkpoint: requeue."""

    exit_code = 75
