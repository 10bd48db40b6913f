"""The `amclip` command: finds the command's module, lets it parse, runs it, turns errors into exit codes."""

import argparse
import importlib
import logging
import sys

from amclip_ds.errors import AmclipError

COMMANDS = {  # the word typed -> its module in amclip_ds/commands
    "demo": "demo",
    "train": "train",
    "recipes": "recipes",
    "data": "data",
    "eval": "evaluate",
    "watch": "watch",
    "export": "export",
    "checkpoints": "checkpoints",
    "submit": "submit",
}
EPILOG = """exit codes: 0 done; 2 a mistake in the command, config or data (one clear line);
3 the run stopped itself (guards); 75 stopped by a signal after a committed checkpoint: requeue.
`amclip COMMAND --help` teaches each command."""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser; with `only`, that command's arguments alone are filled in, since modules cost time to import."""
    parser = argparse.ArgumentParser(
        prog="amclip",
        description="Pre-train CLIP with attentive token removal (A-CLIP) through DeepSpeed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for word, module_name in COMMANDS.items():
        module = importlib.import_module(f"amclip_ds.commands.{module_name}")
        sub = commands.add_parser(
            word, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if only in (None, word):
            module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns its exit code; a mistake is one line on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):  # the deepspeed launcher's; LOCAL_RANK says it too
        argv = argv[1:]
    only = argv[0] if argv and argv[0] in COMMANDS else None
    parser = build_parser(only)
    args, rest = parser.parse_known_args(argv)
    if rest and hasattr(args, "overrides") and not any(word.startswith("-") for word in rest):
        args.overrides += rest  # key=value words behind an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return args.run(args)
    except AmclipError as error:
        print(f"amclip {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"amclip {args.command}: interrupted", file=sys.stderr)
        return 130
