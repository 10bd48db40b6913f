"""The `amclip` command: finds the command's module, lets it parse, runs it, turns errors into exit codes."""

import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from amclip_ds import __version__, json_file
from amclip_ds.arguments import TAKES_SETTINGS, Parser
from amclip_ds.display import printable
from amclip_ds.errors import INTERRUPTED, MISTAKE, AmclipError, Preempted, SettingsError
from amclip_ds.output import kept_from_ending_the_work

COMMANDS = {  # the word typed -> its module in amclip_ds/commands
    "demo": "demo",
    "train": "train",
    "recipes": "recipes",
    "data": "data",
    "eval": "evaluate",
    "watch": "watch",
    "export": "export",
    "masks": "masks",
    "report": "report",
    "checkpoints": "checkpoints",
    "submit": "submit",
    "compare": "compare",
    "plan": "plan",
    "doctor": "doctor",
    "reproduce": "reproduce",
    "samples": "samples",
    "completion": "completion",
}
AGAIN_S = 3.0
EPILOG = """exit codes: 0 done; 1 a fault of amclip or of the machine (its last lines say which);
2 a mistake in the command, config or data (one clear line); 3 the run stopped itself (guards);
75 stopped by a signal after a committed checkpoint: the same command resumes; 130 interrupted
before there was anything to save. `amclip COMMAND --help` explains each command;
`amclip completion bash` makes TAB complete them, with recipes and keys."""


def build_parser(only: str | None = None) -> Parser:
    """The parser; with `only`, that command's arguments alone are filled in, since modules cost time to import."""
    parser = Parser(
        prog="amclip",
        description="Pre-train CLIP with masked image tokens through DeepSpeed: A-CLIP and others.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"amclip_ds {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for word, module_name in COMMANDS.items():
        module = importlib.import_module(f"amclip_ds.commands.{module_name}")
        sub = commands.add_parser(word, help=module.HELP, description=module.__doc__)
        if only in (None, word):
            module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


@kept_from_ending_the_work
def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code; a mistake is one line on standard error, of one rank."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith(("--local_rank=", "--local-rank=")):  # launchers'; LOCAL_RANK says it too
        argv = argv[1:]
    name = f"amclip {argv[0]}" if argv and argv[0] in COMMANDS else "amclip"
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with interruptible(name):
            return run(argv)
    except AmclipError as error:
        from amclip_ds.launch import is_first_rank  # most commands need no launcher

        if not error.is_shared or is_first_rank():
            further = "; the same command resumes from there" if isinstance(error, Preempted) else ""
            print(printable(f"{name}: {error}{further}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command starts again", file=sys.stderr)
        return INTERRUPTED


def run(argv: list[str]) -> int:
    """Parses and runs; what goes wrong is raised."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise SettingsError(f"{argv[0]}: no such command; {hint}")
    parser = build_parser(argv[0] if argv and argv[0] in COMMANDS else None)
    args, rest = parser.parse_known_args(argv)
    settings = next((getattr(args, name) for name in TAKES_SETTINGS if hasattr(args, name)), None)
    if rest and settings is not None and not any(word.startswith("-") for word in rest):
        settings += rest  # key=value words behind an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    json_file.check(getattr(args, "json", None))
    return args.run(args)


def refuse_to_run(module: str) -> int:
    """The answer to `python -m MODULE` for a module that runs nothing. Returns the exit code."""
    name = module.rpartition(".")[2]
    word = next((word for word, of in COMMANDS.items() if of == name), "COMMAND")
    print(f"python -m {module} runs nothing; type: python -m amclip_ds {word} (or amclip {word})", file=sys.stderr)
    return MISTAKE


@contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, again after some seconds, since libraries swallow one while they are imported;
    a second Ctrl-C ends the process at once. What listens by itself (`train`, launchers) replaces this.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard = 0

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal heard
        heard += number == signal.SIGINT
        if heard > 1:
            print(f"{name}: interrupted; the same command starts again", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
