"""Imports go one way: packages import only packages below them, deepspeed in engine/, os.environ in the runtime."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "amclip_ds"
# Each room and what it may import of this package; these serve everybody.
EVERYBODY = {
    "errors",
    "comm",
    "files",
    "host_copies",
    "hub",
    "json_file",
    "jsonl",
    "plain_yaml",
    "plots",
    "module_alone",
    "redact",
    "run_files",
    "safetensors_header",
    "signals",
    "display",
}
BOTTOM = {"compat", "masks", "model", "objectives", "method", "data", "optim"}
MIDDLE = BOTTOM | {"engine", "teacher", "resilience", "record", "grad_cache"}
UPPER = MIDDLE | {"step", "checkpoint", "evaluate", "export", "config", "launch", "submit"}
MAY_IMPORT = {
    "comm": set(),
    "masks": set(),
    "model": {"masks"},
    "objectives": {"model"},
    "compat": set(),
    "plugins": {"masks", "model", "objectives", "configfile"},
    "method": {"objectives", "masks", "model", "data", "compat"},
    "grad_cache": BOTTOM | {"engine"},
    "data": {"data", "masks"},
    "optim": {"optim"},
    "record": {"backlog", "tensorboard_events", "trackers"},
    "launch": {"record", "engine"},
    "engine": MIDDLE,
    "teacher": MIDDLE,
    "resilience": MIDDLE,
    "config": UPPER | {"configfile", "plugins"},
    "plan": MIDDLE | {"config"},
    "doctor": MIDDLE | {"config", "evaluate", "samples"},
    "step": MIDDLE,
    "checkpoint": MIDDLE | {"checkpoint", "config"},
    "evaluate": MIDDLE | {"backlog", "evaluate", "checkpoint", "config"},
    "export": MIDDLE | {"export", "evaluate", "checkpoint", "config"},
    "meter": MIDDLE | {"step"},
    "mask_statistics": {"data"},
    "scenes": MIDDLE | {"config", "evaluate", "step", "mask_statistics"},
    "picture": MIDDLE | {"scenes", "pictures"},
    "recipe_headers": set(),
}
READS_ENVIRONMENT = {"engine/runtime.py", "launch.py", "completion.py"}  # the last what a shell asks at TAB


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(text: str) -> set[str]:
    """Dotted names imported anywhere in a module's text, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(room: str, text: str) -> list[str]:
    wrong = []
    for name in imports_of(text):
        parts = name.split(".")
        if parts[0] == "deepspeed" and room != "engine":
            wrong.append(f"{room} imports deepspeed, which only engine/ does")
        if parts[0] == "amclip_ds" and len(parts) > 1 and room in MAY_IMPORT:
            is_room = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()
            if is_room and parts[1] not in MAY_IMPORT[room] | EVERYBODY | {room}:
                wrong.append(f"{room} imports {parts[1]}, which is above it")
    return wrong


def test_imports_go_down() -> None:
    wrong = {path: wrong_imports(room_of(path), path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path): lines for path, lines in wrong.items() if lines}


@pytest.mark.parametrize("line", ["import deepspeed", "from amclip_ds.engine import student", "import amclip_ds.train"])
def test_a_wrong_import_is_seen(line: str) -> None:
    assert wrong_imports("model", f"def later():\n    {line}\n")
    assert not wrong_imports("model", "from amclip_ds.errors import UserError\nimport torch\n")


def test_only_the_runtime_reads_the_environment() -> None:
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(str(path.relative_to(PACKAGE)))
    assert readers <= READS_ENVIRONMENT, readers - READS_ENVIRONMENT
