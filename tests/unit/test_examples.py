"""Every example of every --help, and every amclip line of the README, is a command that parses, its keys with it."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from amclip_ds import cli
from amclip_ds import config as settings

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = "--plugin"  # of a file that the reader has yet to write


HELPS, SHELLS = r"\s{2,}|\s>\s", r"\s#\s|\s>\s"  # where what is said of a command begins


def examples(text: str, said: str = HELPS) -> list[list[str]]:
    """The words of each `amclip ...` line."""
    found = []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("amclip "):
            command = re.split(said, line)[0]
            words = shlex.split(re.sub(r"[\[\]]", "", command) if " [--" in command else command)
            found.append([word for word in words[1:] if word != "..."])
    return found


def texts_of(command: str) -> str:
    module = importlib.import_module(f"amclip_ds.commands.{cli.COMMANDS[command]}")
    longer = [
        value for name, value in vars(module).items() if name.isupper() and isinstance(value, str) and "\n" in value
    ]
    return "\n".join([module.__doc__ or "", *longer])


def check(words: list[str]) -> None:
    parser = cli.build_parser(words[0])
    args, rest = parser.parse_known_args(words)
    overrides = getattr(args, "overrides", [])
    assert all("=" in word and not word.startswith("-") for word in rest), f"{words}: {rest}"
    if getattr(args, "recipe", None) and MADE_UP not in words:
        settings.load(args.recipe, [*overrides, *rest])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_has_an_example_that_parses(command: str) -> None:
    found = [words for words in examples(texts_of(command)) if words[0] == command]
    assert found, f"amclip {command} --help shows no example"
    for words in found:
        check(words)


def test_the_readmes_commands_parse() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, flags=re.S))
    found = examples(blocks, SHELLS)
    assert len(found) >= 4
    for words in found:
        check(words)


@pytest.mark.parametrize("line", ["amclip train aclip-tiny run.stepps=4", "amclip report runs/x --output y"])
def test_an_example_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises(Exception, match="stepps|--output"):
        check(examples(line)[0])
