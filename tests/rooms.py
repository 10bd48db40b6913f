"""The package as a house: its rooms (folders, and files at the top), the floors they are on, and who imports whom.

  python -m tests.rooms            the picture, floor by floor, with the number of imports

Every import counts, those in a function and those for types too.
"""

import ast
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "amclip_ds"
FLOORS = {  # from the top; a room imports rooms of its own floor, in no circle, and of the floors below
    "the command line": "commands __main__ cli completion shard_tasks",
    "jobs and tools": "submit slurm_attempt sweep planning probe compare demo doctor reproduce samples __init__",
    "a run": "train run run_folder run_checkpoints forecast pictures preconditions meter",
    "trained models": "evaluate export library distill plan stored_checkpoints",
    "settings, one step": "config arguments step run_state",
    "engines on ranks": "engine ranks grad_cache checkpoint resilience record report launch",
    "the method, the data": "method plugins configfile objectives model masks data shards",
    "the ground": "bottleneck comm compat display errors files host_copies hub images json_file jsonl keyed_random"
    " module_alone"
    " optim output plain_yaml plots processes progress recipe_headers redact run_files safetensors_header signals sizes"
    " synonyms",
}
FLOOR_OF = {room: number for number, rooms in enumerate(reversed(FLOORS.values())) for room in rooms.split()}

Arrow = tuple[str, str]
Arrows = Mapping[Arrow, list[str]]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms() -> set[str]:
    return {room_of(path) for path in PACKAGE.rglob("*.py")}


@functools.cache
def nodes_of(text: str) -> tuple[ast.AST, ...]:
    """Of a module's text; texts are asked for several times."""
    return tuple(ast.walk(ast.parse(text)))


def imports_of(text: str) -> set[str]:
    """Dotted names imported anywhere in a module's text, function bodies included."""
    names = set()
    for node in nodes_of(text):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(text: str) -> set[str]:
    """The rooms that a module's text imports from; `__init__` is the package itself."""
    parts = [name.split(".") for name in imports_of(text)]
    inner = [part[1] if len(part) > 1 else "" for part in parts if part[0] == "amclip_ds"]
    return {
        name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() else "__init__" for name in inner if name
    }


@functools.cache
def arrows() -> dict[Arrow, list[str]]:
    """(importing room, imported room) -> the modules that do it."""
    found: dict[Arrow, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for room in rooms_imported(path.read_text()) - {room_of(path)}:
            found.setdefault((room_of(path), room), []).append(str(path.relative_to(PACKAGE)))
    return found


def upward(found: Arrows) -> dict[Arrow, list[str]]:
    return {(a, b): where for (a, b), where in found.items() if FLOOR_OF[a] < FLOOR_OF[b]}


def circles(found: Arrows) -> list[set[str]]:
    """The strongly connected components of more than one room."""
    below: dict[str, set[str]] = {}
    for importing, imported in found:
        below.setdefault(importing, set()).add(imported)

    def reached(room: str) -> Iterator[str]:
        seen, waiting = set[str](), [room]
        while waiting:
            for other in below.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
                yield other

    reach = {room: set(reached(room)) for room in below}
    found_circles = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in below if a in reach[a]}
    return [set(circle) for circle in found_circles]


def picture(found: Arrows) -> str:
    """The floors from the top, each with its rooms (imported by how many others) and where its imports go."""
    wanted = Counter(imported for _, imported in found)
    lines = [
        f"{len(rooms())} rooms on {len(FLOORS)} floors, {len(found)} arrows, {len(upward(found))} up, "
        f"{len(circles(found))} circles; behind a room: how many others import it",
        "",
    ]
    for place, (label, names) in enumerate(FLOORS.items()):
        level = len(FLOORS) - 1 - place
        to = Counter(FLOOR_OF[b] for a, b in found if FLOOR_OF[a] == level)
        shown = ", ".join(f"{to[other]} to {other}" for other in sorted(to, reverse=True))
        lines.append(f"{level}  {label}: " + ", ".join(f"{name} {wanted[name]}" for name in sorted(names.split())))
        lines += [f"     imports, by floor: {shown or 'none'}"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(picture(arrows()))
