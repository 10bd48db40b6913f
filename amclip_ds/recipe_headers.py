"""What a method's recipe says of itself in the comment above its keys: what it is, from where, what it changes, which
numbers are known, what is inferred.

The first line is what it is; `# Group: ...`, `# Source: ...` and so on begin a part each, and a line that begins with
`#   ` continues with the part above it.
"""

from dataclasses import dataclass
from pathlib import Path

PARTS = ("Group", "Source", "Changes", "Numbers", "Inferred")
GROUPS = ("the paper's table", "masks that came after", "other objectives", "other optimizers", "second stages")
FOLDER = Path(__file__).parent / "recipes" / "methods"


@dataclass(frozen=True)
class Header:
    """One recipe's."""

    method: str
    title: str
    parts: dict[str, str]
    """of PARTS -> what is said"""

    @property
    def group(self) -> str:
        return self.parts.get("Group", "others")


def read_header(method: str) -> Header:
    """The header of a method that has a recipe; what it does not say is left out."""
    title, parts, part = "", dict[str, str](), ""
    for line in (FOLDER / f"{method}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        name, colon, said = line[2:].partition(": ")
        if line.startswith("#   ") and part:
            parts[part] += f" {line[4:]}"
        elif colon and name in PARTS:
            part, parts[name] = name, said
        else:
            title = f"{title} {line[2:]}".strip()
    return Header(method, title, parts)


def all_headers() -> list[Header]:
    """Every method's, by group; in a group by name."""
    found = [read_header(path.stem) for path in FOLDER.glob("*.yaml")]
    order = {group: place for place, group in enumerate(GROUPS)}
    return sorted(found, key=lambda header: (order.get(header.group, len(order)), header.method))
