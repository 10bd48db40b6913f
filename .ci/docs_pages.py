"""A hook of mkdocs: the pages that are made from the program itself, and those whose file is elsewhere."""

import importlib
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from amclip_ds import cli, config
from amclip_ds.recipe_headers import FOLDER, all_headers

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {  # page -> the file it is a copy of
    "slurm.md": ROOT / "slurm" / "README.md",
    "ds-configs.md": ROOT / "ds_configs" / "README.md",
    "containers.md": ROOT / "containers" / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
EXPLAINED = "aclip-vitb16"  # the recipe whose values are beside the keys
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def recipes() -> str:
    """Every method's recipe by group: what it says of itself, and its keys."""
    lines = [
        "# Recipes",
        "",
        f"A recipe is METHOD-SIZE; SIZE is {', '.join(f'`{size}`' for size in config.size_names())}.",
    ]
    lines += ["`amclip recipes METHOD-SIZE` prints one resolved: every key, its value, what it means.", ""]
    group = ""
    for header in all_headers():
        if header.group != group:
            group = header.group
            lines += [f"## {group[0].upper()}{group[1:]}", ""]
        lines += [f"### {header.method}", "", header.title, ""]
        lines += [f"- **{part}**: {said}" for part, said in header.parts.items() if part != "Group"]
        text = (FOLDER / f"{header.method}.yaml").read_text()
        keys = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
        lines += ["", "```yaml", keys.strip() or "# the defaults", "```", ""]
    return "\n".join(lines)


def commands() -> str:
    """Every command's --help."""
    os.environ["COLUMNS"] = "110"
    parts = ["# Commands", "", "What `amclip COMMAND --help` prints.", ""]
    for word in cli.COMMANDS:
        sub = next(iter(cli.build_parser(word)._subparsers._group_actions)).choices[word]  # type: ignore[union-attr]
        module = importlib.import_module(f"amclip_ds.commands.{cli.COMMANDS[word]}")
        parts += [f"## amclip {word}", "", f"{module.HELP[0].upper()}{module.HELP[1:]}.", "", "```text"]
        parts += [sub.format_help().strip(), "```", ""]
        for action in (action for action in (sub._subparsers._group_actions if sub._subparsers else [])):
            for name, inner in action.choices.items():  # type: ignore[union-attr]
                parts += [f"### amclip {word} {name}", "", "```text", inner.format_help().strip(), "```", ""]
    return "\n".join(parts)


def keys() -> str:
    """Every key: its value in one recipe and its meaning."""
    lines = ["# Keys", "", f"Every key of a run, with its value in `{EXPLAINED}`: `amclip recipes {EXPLAINED}`.", ""]
    section = ""
    for key, value, meaning in config.explain(config.load(EXPLAINED, [])):
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines += ["", f"## {section}", "", "| key | value | meaning |", "|---|---|---|"]
        shown = "null" if value is None else str(value)
        lines.append(f"| `{key}` | `{_cell(shown)}` | {_cell(_escape(meaning))} |")
    return "\n".join(lines) + "\n"


GENERATED = {"recipes.md": recipes, "commands.md": commands, "keys.md": keys}


def on_files(files: Any, config: Any) -> Any:
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=_with_links_of(source.read_text(), source.parent, Path())))
    for name, write in GENERATED.items():
        files.append(File.generated(config, name, content=write()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page in docs/ to a file outside lead to its copy, or become plain text where there is none."""
    if page.file.src_uri in ELSEWHERE or page.file.src_uri in GENERATED:
        return markdown
    here = Path(page.file.src_uri).parent
    return _with_links_of(markdown, DOCS / here, here)


def _with_links_of(text: str, folder: Path, page_folder: Path) -> str:
    """`text` with the links of a file in `folder`, for a page in `page_folder` of the site."""
    copies = {source.resolve(): page for page, source in ELSEWHERE.items()}

    def moved(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found.group(0)
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if file in copies:
            page: Path | str = copies[file]
        elif file.is_relative_to(DOCS) and (file.is_file() or file.name in GENERATED):
            page = file.relative_to(DOCS)
        else:
            return words
        return f"{mark}[{words}]({os.path.relpath(page, page_folder)}{'#' + anchor if anchor else ''})"

    return LINK.sub(moved, text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _escape(text: str) -> str:
    return re.sub(r"([*_<\[])", r"\\\1", text)
