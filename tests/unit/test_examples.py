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
        len(PAGES["README.md"]) >= 4 and len(PAGES["docs/quick-start.md"]) >= 8 and len(PAGES["docs/cluster.md"]) >= 6
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
    for option in {"--workers", "--sample"} & set(replaced):  # of 64 scenes a hundredth is none
        replaced[replaced.index(option) + 1] = "1"
    assert cli.main(replaced) == 0


@pytest.mark.parametrize("line", ["amclip train aclip-tiny run.stepps=4", "amclip report runs/x --output y"])
def test_an_example_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises(Exception, match="stepps|--output"):
        check(examples(line)[0])


RUN_BY = {  # the first words of a documented line that is no `amclip` -> the test, or the rule, that runs it
    r"sbatch |for .* sbatch |job=\$\(sbatch |cp slurm/sites/": "tests/slurm/test_documented_lines.py",
    r"make [a-z-]+": "Makefile",
    r"git clone |cd amclip_ds && make setup|python3.11 -m venv |pip install '": ".ci/setup.sh",
    r"tail -f ": "README.md",  # any file will do
}
SHOWN = r"RUN/checkpoints|  |train\.sbatch: |$"  # a folder, a log: what is seen, not typed


def other_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks that begin with another command than ours."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", page.read_text().replace("\\\n", " "), flags=re.S)
    lines = [line for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(("amclip ", "#")) and not re.match(SHOWN, line)]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "containers/README.md"])
def test_every_other_line_is_run_by_a_test(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for line in other_lines(ROOT / page):
        owner = next((test for words, test in RUN_BY.items() if re.match(words, line)), None)
        assert owner is not None and (ROOT / owner).is_file(), f"{page}: nothing runs {line!r}"
        assert set(re.findall(r"\bmake ([a-z-]+)", line)) <= targets, f"{page}: {line!r}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_module_that_a_page_runs_is_there(page: str) -> None:
    for module in re.findall(r"python -m ((?:amclip_ds|benchmarks|tests)[\w.]*)", (ROOT / page).read_text()):
        path = module.replace("amclip_ds.benchmarks", "benchmarks").replace(".", "/")
        assert (ROOT / f"{path}.py").is_file() or (ROOT / path / "__main__.py").is_file(), f"{page}: {module}"
