"""Shell completion: `amclip completion bash|zsh` prints the shell's part; here is what it asks `amclip` at each TAB.

argcomplete asks and answers; commands and options come from the parsers, recipes, keys and values from the
settings. Torch is not loaded. Keys are offered in front of options, not behind them.
"""

import os
from typing import Any

ASKED = "_ARGCOMPLETE"  # argcomplete's: a shell asks, in COMP_LINE and COMP_POINT
SHELLS = ("bash", "zsh")


def is_asked() -> bool:
    """Whether a shell asks what may follow at its cursor, instead of running a command."""
    return ASKED in os.environ


def answer() -> None:
    """Writes the answer for the shell and ends the process."""
    import argcomplete

    from amclip_ds import cli

    words = os.environ.get("COMP_LINE", "").split()
    parser = cli.build_parser(words[1] if len(words) > 1 and words[1] in cli.COMMANDS else None)
    for inner in _with_inner(parser):
        for action in inner._actions:
            if action.dest in COMPLETERS:
                action.completer = COMPLETERS[action.dest]  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def script(shell: str) -> str:
    """What a shell sources."""
    import argcomplete

    return argcomplete.shellcode(["amclip"], shell=shell)


def recipes(prefix: str, **_: Any) -> list[str]:
    """Names of recipes; and, since a recipe may be a yaml of one's own, the yaml files below what is typed."""
    from argcomplete.completers import FilesCompleter

    from amclip_ds import config

    files = FilesCompleter(["yaml", "yml"])(prefix) if prefix.startswith((".", "/", "~")) else []
    return [*(name for name in config.recipe_names() if name.startswith(prefix)), *files]


def settings(prefix: str, **_: Any) -> list[str]:
    """`key=` for each key, and behind it the values of keys that have few."""
    from amclip_ds import config

    types = config.keys_and_types()
    key, equals, begun = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in types if name.startswith(prefix)]
    return [f"{key}={value}" for value in _values(key, types.get(key)) if value.startswith(begun)]


def recipes_or_settings(prefix: str, **_: Any) -> list[str]:
    return [*recipes(prefix), *settings(prefix)]


COMPLETERS = {
    "recipe": recipes,
    "overrides": settings,
    "recipes_or_settings": recipes_or_settings,
}  # an argument's name -> its own


def _values(key: str, kind: Any) -> list[str]:
    from amclip_ds.engine.ds_config import AUTO, BLOCK, DS_CONFIGS, FP8_ALL, FP8_TEACHER, NO_COMPILE, NO_FP8, TOWER
    from amclip_ds.masks import MASKS, NONE

    if key == "engine.deepspeed":
        return sorted(file.name for file in DS_CONFIGS.glob("*.json"))
    few = {
        "mask.strategy": [*MASKS, NONE],
        "engine.compile": [AUTO, NO_COMPILE, BLOCK, TOWER],
        "engine.fp8": [NO_FP8, FP8_TEACHER, FP8_ALL],
    }
    return ["true", "false"] if kind is bool else few.get(key, [])


def _with_inner(parser: Any) -> list[Any]:
    """The parser and those of its commands, at any depth."""
    choices = [action.choices for action in parser._subparsers._group_actions] if parser._subparsers else []
    return [parser, *(found for each in choices for inner in each.values() for found in _with_inner(inner))]
