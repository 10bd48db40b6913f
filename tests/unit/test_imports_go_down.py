"""Imports go down and in no circle (tests/rooms.py has the floors); deepspeed and os.environ have their places."""

import ast
import functools
from pathlib import Path

import pytest

from tests.rooms import (
    FLOOR_OF,
    FLOORS,
    PACKAGE,
    arrows,
    circles,
    imports_of,
    nodes_of,
    picture,
    room_of,
    rooms,
    rooms_imported,
    upward,
)

ROOT = PACKAGE.parent
GROUND = set(FLOORS["the ground"].split())
ALONE = {  # rooms that import less of the package than their floor allows: they know nothing of ranks
    "masks": GROUND,
    "model": GROUND | {"masks"},
    "objectives": GROUND | {"masks", "model"},
    "shards": GROUND,
    "data": GROUND | {"shards", "masks"},
    "report": GROUND | {"data", "shards", "record"},
    "recipe_headers": set(),
    "comm": set(),
}
IMPORT_DEEPSPEED = {"ranks/runtime.py", "ranks/communication_time.py"}  # besides engine/
READ_ENVIRONMENT = {"ranks/runtime.py", "launch.py", "completion.py", "submit.py"}  # the last two what a shell asks at
# TAB, and what sbatch reads of it


def too_much(room: str, text: str) -> set[str]:
    """What a module of a room of ALONE imports beyond what it may."""
    return rooms_imported(text) - ALONE[room] - {room}


def test_every_room_is_on_a_floor() -> None:
    assert set(FLOOR_OF) == rooms(), "tests/rooms.py: FLOORS"


def test_imports_go_down_and_in_no_circle() -> None:
    found = arrows()
    print(picture(found))
    assert not upward(found)
    assert not circles(found)


def test_an_arrow_up_and_a_circle_are_seen() -> None:
    found = arrows()
    assert upward(found | {("masks", "train"): ["masks/attentive.py"]}) == {("masks", "train"): ["masks/attentive.py"]}
    assert circles(found | {("shards", "data"): ["shards/index.py"]}) == [{"shards", "data"}]


def test_masks_model_objectives_and_data_know_no_ranks() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if room_of(path) in ALONE]
    wrong = {str(path): too_much(room_of(path), path.read_text()) for path in modules}
    assert not {path: found for path, found in wrong.items() if found}


@pytest.mark.parametrize("line", ["from amclip_ds.ranks import runtime", "import amclip_ds.train"])
def test_a_wrong_import_is_seen(line: str) -> None:
    assert too_much("model", f"def later():\n    {line}\n")
    assert not too_much("model", "from amclip_ds.errors import UserError\nimport torch\n")


@functools.cache
def names_of(module: Path) -> set[str]:
    """All that a module's text binds, anywhere in it."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return found | {a.asname or a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}


def file_of(module: str) -> Path | None:
    place = ROOT / module.replace(".", "/")
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)


def lost_imports(text: str) -> list[str]:
    """`from` imports of ours that lead nowhere."""
    lost = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("amclip_ds", "tests"):
            file = file_of(node.module or "")
            known = names_of(file) if file else set()
            lost += [f"{node.module}.{a.name}" for a in node.names if a.name not in known]
    return [name for name in lost if file_of(name) is None]


@pytest.mark.nightly
def test_imports_of_tests_and_benchmarks_lead_somewhere() -> None:
    """Most of them are run by night or by hand alone."""
    modules = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): lost_imports(path.read_text()) for path in modules}
    assert not {path: names for path, names in found.items() if names}
    assert lost_imports("from amclip_ds.checkpoint import save, tools") == ["amclip_ds.checkpoint.tools"]


def test_deepspeed_is_imported_by_the_engine_and_two_modules() -> None:
    importing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name in imports_of(path.read_text()))
    }
    assert {path for path in importing if not path.startswith("engine/")} == IMPORT_DEEPSPEED


def test_only_the_runtime_reads_the_environment() -> None:
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in nodes_of(path.read_text()):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(str(path.relative_to(PACKAGE)))
    assert readers <= READ_ENVIRONMENT, readers - READ_ENVIRONMENT
