"""Imports go one way: rooms import only rooms below them, deepspeed stays in engine/, os.environ in the runtime."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "amclip_ds"
# Each room and what it may import of this package; errors, files and the line reader serve everybody.
EVERYBODY = {"errors", "files", "jsonl"}
BOTTOM = {"model", "loss", "data", "optim"}
MIDDLE = BOTTOM | {"engine", "teacher", "resilience", "record"}
UPPER = MIDDLE | {"step", "checkpoint", "evaluate", "export", "config", "launch", "submit"}
MAY_IMPORT = {
    "model": {"model", "loss"},
    "loss": {"loss"},
    "data": {"data"},
    "optim": {"optim"},
    "record": set(),
    "launch": {"record", "engine"},
    "engine": MIDDLE,
    "teacher": MIDDLE,
    "resilience": MIDDLE,
    "config": UPPER,
    "step": MIDDLE | {"config"},
    "checkpoint": MIDDLE | {"checkpoint", "config"},
    "evaluate": MIDDLE | {"evaluate", "checkpoint", "config"},
    "export": MIDDLE | {"export", "evaluate", "checkpoint", "config"},
    "meter": MIDDLE | {"step"},
    "scenes": MIDDLE | {"config", "evaluate", "step"},
    "picture": MIDDLE | {"scenes"},
}
READS_ENVIRONMENT = {"engine/runtime.py", "launch.py"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(path: Path) -> list[str]:
    room, wrong = room_of(path), []
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "deepspeed" and room != "engine":
            wrong.append(f"{path}: imports deepspeed outside engine/")
        if parts[0] == "amclip_ds" and len(parts) > 1 and room in MAY_IMPORT:
            is_room = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
            if is_room and parts[1] not in MAY_IMPORT[room] | EVERYBODY | {room}:
                wrong.append(f"{path}: {room} imports {parts[1]}, which is above it")
    return wrong


def test_imports_go_down() -> None:
    assert not [line for path in PACKAGE.rglob("*.py") for line in wrong_imports(path)]


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    for source in ("import deepspeed", "from amclip_ds.engine import student", "import amclip_ds.train"):
        file = PACKAGE / "model" / "_probe_of_the_import_test.py"
        file.write_text(source + "\n")
        try:
            assert wrong_imports(file), source
        finally:
            file.unlink()


def test_only_the_runtime_reads_the_environment() -> None:
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(str(path.relative_to(PACKAGE)))
    assert readers <= READS_ENVIRONMENT, readers - READS_ENVIRONMENT
