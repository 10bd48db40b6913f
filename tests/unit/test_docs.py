"""The records are true to themselves: links lead somewhere, lists are whole, the tour covers every module."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from amclip_ds import cli, configfile
from amclip_ds import config as settings

ROOT = Path(__file__).resolve().parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if (ROOT / name).is_file()
] or [path for path in ROOT.rglob("*") if path.suffix in (".md", ".py") and ".venv" not in path.parts]
PAGES = [path for path in TRACKED if path.suffix == ".md"]
DECISIONS = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(page: Path, text: str) -> list[str]:
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    found = (target.split("#")[0] for target in LINK.findall(text) if not re.match(r"[a-z]+:", target))
    places = {target: page.parent / target for target in found if target}
    return [target for target, place in places.items() if not place.exists()]


def test_every_link_leads_somewhere() -> None:
    assert len(PAGES) > 50
    broken = {str(page.relative_to(ROOT)): broken_links(page, page.read_text()) for page in PAGES}
    assert not {page: targets for page, targets in broken.items() if targets}


def test_a_broken_link_is_seen() -> None:
    assert broken_links(ROOT / "README.md", "see [the log](docs/log.md)") == ["docs/log.md"]


def uneven_rows(text: str) -> list[str]:
    """Rows of a table with another number of cells than its first. As GitHub reads them: a `|` parts cells in a code
    span too, unless a backslash is before it."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    wrong = []
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        first, *others = table.splitlines()
        wrong += [row for row in others if num_cells(row) != num_cells(first)]
    return wrong


def num_cells(row: str) -> int:
    return len(re.split(r"(?<!\\)\|", re.sub(r"(?<!\\)\|$", "", row.strip()))) - 1


def test_every_row_of_a_table_has_as_many_cells_as_its_first() -> None:
    assert not {page.name: rows for page in PAGES if (rows := uneven_rows(page.read_text()))}


def test_an_uneven_row_is_seen() -> None:
    head = "| a | b |\n|---|---|\n"
    for row in ("| 1 | 2 |", r"| `x\|y` | 2 \| 3 |", "| | 2 |", "| 1 | 2"):
        assert not uneven_rows(f"text\n\n{head}{row}\n\ntext | text")
    for row in ("| 1 2 |", "| 1 | 2 | 3 |", "| `x|y` | 2 |"):
        assert uneven_rows(head + row) == [row]


KEYED = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "slurm" / "README.md"]
FILE = re.compile(r"\.(sbatch|jsonl|safetensors|md|py|yaml|json)$")
NO_KEYS = {  # parameters' names, and a field of a saved state
    "checkpoint-format.md": {"heads.o2o.*", "heads.o2e_projector.*", "heads.o2e_predictor.*", "teacher.*", "run.step"}
}


def unknown_keys(text: str) -> set[str]:
    """What is written in code spans like a key or a section of the settings, and is none. NAME and * are any name, N is
    any place."""
    known = settings.keys_and_types()
    sections = "|".join({key.split(".")[0] for key in known if "." in key})
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    wrong = set()
    for span in re.findall(r"`([^`]+)`", text):
        for word in re.findall(rf"(?<![\w/.-])((?:{sections})(?:\.[\w*]+)+)(?![\w/-])", span):
            key = re.sub(r"\.N(?=\.|$)", ".0", word)
            pattern = re.sub(r"NAME|\\\*", r"\\w+", re.escape(key)) + r"(\..*)?"
            if not FILE.search(word) and not any(re.fullmatch(pattern, k) for k in configfile.with_items(known, [key])):
                wrong.add(word)
    return wrong


def test_every_key_that_a_page_names_is_known() -> None:
    found = {page.name: unknown_keys(page.read_text()) - NO_KEYS.get(page.name, set()) for page in KEYED}
    assert not {page: keys for page, keys in found.items() if keys}


def test_an_unknown_key_is_seen() -> None:
    known = "`data.train=a data.views.1.mask.keep_ratio` `loss.NAME.weight` `mask.pgs.*` `data.views.N.flip: no`"
    assert not unknown_keys(known + " optim.lrr `slurm/data.sbatch` `RUN/eval.jsonl` `eval.jsonl` `data.text_mask`")
    for word in ("optim.lrr", "data.views.1.mask.keep", "mask.pg.*", "loss.NAME.wait", "data.text_musk"):
        assert unknown_keys(f"`amclip train {word}=1`") == {word}


def test_every_page_and_decision_that_is_cited_exists() -> None:
    numbers = {page.name[:4] for page in DECISIONS}
    wrong = []
    for path in TRACKED:
        if path.suffix not in (".md", ".py", ".sh", ".sbatch", ".yaml") or path == Path(__file__):
            continue
        text = path.read_text()
        wrong += [f"{path}: {page}" for page in re.findall(r"docs/[\w/-]+\.md", text) if not (ROOT / page).exists()]
        cited = re.findall(r"(?:adr/|ADR )(\d{4})", text)
        wrong += [f"{path}: ADR {number}" for number in cited if number not in numbers]
    assert not wrong


def test_every_file_test_and_benchmark_that_a_page_names_exists() -> None:
    tests = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    } | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    wrong = []
    for page in PAGES:
        text = page.read_text()
        folders = "tests|slurm|benchmarks|amclip_ds|ds_configs|docs"
        files = set(re.findall(rf"(?<![\w/.])((?:{folders})/[a-z0-9_/-]+\.(?:py|md|sbatch|sh|json))\b", text))
        files |= {f"benchmarks/{name}.py" for name in re.findall(r"python -m benchmarks\.(\w+)", text)}
        wrong += [f"{page.name}: {file}" for file in files if not (ROOT / file).exists()]
        named = set(re.findall(r"\b(test_\w+)\b", text))
        wrong += [f"{page.name}: {name}" for name in named if not any(known.startswith(name) for known in tests)]
    assert not wrong


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.name[:4])
def test_a_decision_has_title_status_date_decision_and_reason(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert re.fullmatch(rf"# {page.name[:4]}\. \S.{{5,95}}", lines[0])
    status = r"(proposed|accepted|superseded by \d{4})"
    assert re.fullmatch(rf"Status: {status}\. Date: \d{{4}}-\d\d-\d\d(, changed \d{{4}}-\d\d-\d\d)?\.", lines[2])
    assert lines[4].startswith("**Decision.**")
    assert "\n**Why" in page.read_text()


def test_the_list_of_decisions_is_whole() -> None:
    rows = re.findall(r"^\| \[(.+)\]\((.+)\) \| (.+) \| (.+) \|$", (ROOT / "docs/adr/README.md").read_text(), re.M)
    expected = []
    for page in DECISIONS:
        lines = page.read_text().splitlines()
        status, date = re.findall(r"^Status: (.+?)\. Date: ([\d-]+)", lines[2])[0]
        expected.append((lines[0][2:], page.name, status, date))
    assert rows == expected


@pytest.mark.parametrize("folder", ["results", "log"])
def test_the_list_of_pages_is_whole(folder: str) -> None:
    pages = {path.name for path in (ROOT / "docs" / folder).glob("*.md")} - {"README.md"}
    assert set(LINK.findall((ROOT / "docs" / folder / "README.md").read_text())) >= pages


def test_the_tour_covers_every_module_and_package() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "amclip_ds"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    packages = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    missing = sorted(name for name in modules | packages if f"`{name}`" not in tour)
    assert not missing, f"CONTRIBUTING.md names no {missing}"


def test_what_the_tour_names_exists() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    for path, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", tour):
        text = (ROOT / "amclip_ds" / path).read_text()
        assert all(re.search(rf"(def|class) {part}\b", text) for part in name.split(".")), f"{path}:{name}"
    for path in re.findall(r"`([\w/]+\.py)`", tour):
        assert (ROOT / "amclip_ds" / path).exists() or (ROOT / path).exists() or list(ROOT.rglob(path)), path


def messages_of_the_program() -> list[str]:
    """All texts in the code: pieces of a message are joined, what is filled in is `...`."""
    found = []
    for path in [*(ROOT / "amclip_ds").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def listed_messages() -> list[str]:
    """The messages in the first column of docs/troubleshooting.md."""
    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def unknown_messages(listed: list[str]) -> list[str]:
    """Those that no single text of the program contains, with anything for the `...`."""
    program = messages_of_the_program()
    patterns = {text: re.compile(".*".join(map(re.escape, text.strip(".").split("...")))) for text in listed}
    return [text for text, pattern in patterns.items() if not any(map(pattern.search, program))]


def test_troubleshooting_lists_messages_that_there_are() -> None:
    listed = listed_messages()
    assert len(listed) > 35
    assert not unknown_messages(listed)
    assert unknown_messages(["run.out: ... is held by ...; stop that one first"])


def test_the_readme_names_every_command_and_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [word for word in cli.COMMANDS if f"`amclip {word}" not in readme]
    methods = {path.stem for path in (ROOT / "amclip_ds" / "recipes" / "methods").glob("*.yaml")}
    assert not [method for method in methods if not re.search(rf"(?<![\w-]){method}(?!\w|-(?!SIZE))", readme)]
