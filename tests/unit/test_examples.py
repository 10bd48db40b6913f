"""Every example of every --help, and every amclip line of the README and the docs, is a command that parses, its keys
with it; those that need neither a run nor a GPU are run, with their paths replaced."""

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


def of_page(page: Path) -> list[list[str]]:
    """The amclip lines of a page's code blocks."""
    text = page.read_text().replace("\\\n", " ")
    return examples("\n".join(re.findall(r"```\w*\n(.*?)```", text, flags=re.S)), SHELLS)


PAGES = {
    str(page.relative_to(ROOT)): of_page(page)
    for page in (ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def test_the_pages_have_commands() -> None:
    assert (
        len(PAGES["README.md"]) >= 4 and len(PAGES["docs/quick-start.md"]) >= 8 and len(PAGES["docs/cluster.md"]) >= 7
    )


@pytest.mark.parametrize("page", [page for page, found in PAGES.items() if found])
def test_a_pages_commands_parse(page: str) -> None:
    for words in PAGES[page]:
        check(words)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "scenes"
    words = ["data", "synth", "--out", str(folder), "--train", "64", "--test", "64", "--shard-size", "32"]
    assert cli.main([*words, "--workers", "1"]) == 0
    return folder


def is_cheap(words: list[str]) -> bool:
    """Whether it needs neither a run nor a GPU, and takes seconds."""
    if words[0] == "data":
        return words[1] in ("check", "index", "stats")
    return words[0] == "recipes" or (words[0] == "plan" and "--probe" not in words)


ALL = {" ".join(words): words for found in PAGES.values() for words in found}
RUN = [words for words in ALL.values() if is_cheap(words)]


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_a_pages_cheap_commands_run(
    words: list[str], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced = [str(scenes / "train") if "/" in word and "=" not in word else word for word in words]
    if "--workers" in replaced:
        replaced[replaced.index("--workers") + 1] = "1"
    assert cli.main(replaced) == 0


@pytest.mark.parametrize("line", ["amclip train aclip-tiny run.stepps=4", "amclip report runs/x --output y"])
def test_an_example_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises(Exception, match="stepps|--output"):
        check(examples(line)[0])
