"""How a command line is read: exact options only, and every mistake is one line that names what to type instead."""

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from amclip_ds.errors import SettingsError

TAKES_SETTINGS = ("overrides", "recipes_or_settings")  # the names of arguments that take key=value words


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations (`--gpus` is not `--gpus-per-node`); its errors are SettingsErrors."""

    def __init__(self, **how: Any) -> None:
        usual: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**usual | how)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (`{self.prog} --help` lists what there is)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an option that there is not is answered before its value is taken for a word."""
        if self._subparsers is None:
            self._refuse_strangers(list(args or []))
        return super().parse_known_args(args, namespace)

    def _refuse_strangers(self, words: list[str]) -> None:
        words = words[: words.index("--")] if "--" in words else words
        reported = {}
        for before, word in zip(["", *words], words):
            option = word.split("=", 1)[0]
            is_option = re.match(r"--?[A-Za-z]", word) and option not in self._option_string_actions
            if is_option and before == "--sbatch":
                raise SettingsError(f"--sbatch {word}: write --sbatch={word}")
            if is_option:
                reported[option] = f"{option}: unknown option; {self._suggest(option, word)}"
        if reported:
            raise SettingsError("; ".join(reported.values()))

    def _suggest(self, option: str, word: str) -> str:
        """An option of this command, or the key that it means where the command takes keys."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        alike = [name for name in options if name.replace("-", "_") == "--" + option.lstrip("-").replace("-", "_")]
        alike = alike or [name for name in options if name.startswith(option)]
        if alike:
            return f"did you mean {alike[0]}?"
        if any(action.dest in TAKES_SETTINGS for action in self._actions):
            from amclip_ds import config, synonyms

            keys, key = config.keys_and_types(), option.lstrip("-")
            if key in keys:
                return f"keys are written without dashes: {key}={word.partition('=')[2] or 'VALUE'}"
            if suggestion := synonyms.suggest(key):
                return suggestion
            options += [*keys]
        near = difflib.get_close_matches(option, options, n=1, cutoff=0.7)
        return f"did you mean {near[0]}?" if near else f"`{self.prog} --help` lists what there is"


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """--plugin, for every command whose settings may name a mask or an objective (config.load takes args.plugin)."""
    says = "masks and objectives of your own (docs/add-your-own.md); repeatable"
    parser.add_argument("--plugin", action="append", default=[], metavar="NAME|FILE.py", help=says)


def add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The recipe and the settings over it. nargs: "?" where the command has a use without a recipe."""
    says = "a recipe's name (amclip recipes) or the path of a yaml"
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help=says)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings laid over the recipe")


def add_training(parser: argparse.ArgumentParser) -> None:
    """The words of `amclip train`, which a job script takes too."""
    add_recipe(parser)
    parser.add_argument("--procs", type=whole(1, 1024), metavar="N", help="start N processes on this machine")
    parser.add_argument(
        "--max-restarts",
        type=whole(0, 1000),
        metavar="N",
        help="with --procs: when a rank is lost, start all again from the newest checkpoint, up to N times (default 0)",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|never",
        help="auto (default): resume from the newest checkpoint, fresh only if there is none",
    )
    add_plugin(parser)


def plugin_words(plugins: list[str]) -> list[str]:
    """The words that give another command, in whatever folder, the same plug-ins."""
    files = {plugin: str(Path(plugin).absolute()) for plugin in plugins if plugin.endswith(".py") or "/" in plugin}
    return [f"--plugin={files.get(plugin, plugin)}" for plugin in plugins]


def whole(least: int, most: int = 10**12) -> Callable[[str], int]:
    """For `type=`: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,15}", text.strip()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return int(text)

    return read


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def share(text: str) -> float:
    """For `type=`: a number above 0, 1 at most."""
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]")
    return value


def number(least: float, most: float = 1e9) -> Callable[[str], float]:
    """For `type=`: a number from `least` to `most`."""

    def read(text: str) -> float:
        value = _float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is outside [{least:g}, {most:g}]")
        return value

    return read
