"""Words of a private dialect that readers of this field stumble over, with what is written instead."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTEAD = {
    r"told|tells|telling": "reported, logged, shown, set",
    r"mend|mends|mended": "fix",
    r"door|forestall\w*": "interface; missing",
    r"goes on|went on|go on from": "continues, resumes",
    r"stands|stood": "is, is stored",
    r"lies": "is, is stored",
    r"at hand": "available, current",
    r"likewise": "the same",
    r"guilty|deaf|farewell": "failing; ignoring; timeout",
}
WORDS = re.compile("|".join(rf"\b(?:{words})\b" for words in INSTEAD), re.I)
# names that said nothing of what they are; docs/results/house.md has the new ones
RETIRED = """
    Keeper keeper look_at made_ahead run_over Died superfluous grave several_backwards trust_the_norm exact_masters
    ours_from to_theirs own_pixels crops_as_we_do Arrivals told door mend forestalled Flight land
    GOING COMING ASIDE TOLD FAREWELL_S ALWAYS_BORNE PASSING LOOKED_AT UPSIDE TELLING
"""


def words_of(path: Path) -> list[str]:
    """The words in names, comments, docstrings and messages of a module."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            found += [f"{path.name}:{token.start[0]}: {word}" for word in WORDS.findall(token.string)]
        if token.type == tokenize.NAME and token.string.lstrip("_") in RETIRED.split():
            found.append(f"{path.name}:{token.start[0]}: {token.string}")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found += [f"{path.name}:{node.lineno}: {node.name}" for _ in WORDS.findall(node.name.replace("_", " "))]
    return found


@pytest.mark.parametrize("part", ["amclip_ds", "tests"])
def test_the_code_speaks_the_fields_words(part: str) -> None:
    modules = [path for path in sorted((ROOT / part).rglob("*.py")) if path != Path(__file__).resolve()]
    assert not [word for path in modules for word in words_of(path)]


SCRIPTS = [
    *(
        path
        for folder in ("amclip_ds/recipes", "slurm")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file()
    ),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


def test_recipes_job_scripts_and_benchmarks_speak_them_too() -> None:
    assert len(SCRIPTS) > 50
    found = {f"{path.relative_to(ROOT)}": WORDS.findall(path.read_text()) for path in SCRIPTS}
    assert not {path: words for path, words in found.items() if words}


def test_a_word_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('def what_stands(shut):\n    """Goes on."""\n    print("stands", shut)  # likewise\n')
    assert len(words_of(module)) == 4
    module.write_text("class Keeper:\n    ours = 1\n")
    assert len(words_of(module)) == 1


def test_the_formatter_decides_everywhere() -> None:
    """docs/adr/0192."""
    skips = "# fmt: " + "skip"
    modules = [path for part in ("amclip_ds", "tests", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    assert not [str(path) for path in modules if skips in path.read_text()]
