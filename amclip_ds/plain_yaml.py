"""Yaml as plain values: every yaml of ours is read here, whoever wrote it (configs, recipes, sweeps, checkpoints').

Null, booleans, numbers, texts, lists and maps with texts for keys; nothing else. No tag makes another type, no `${...}`
is ever resolved (OmegaConf, which merges what is read here, would read the environment for `${oc.env:...}`), and what
aliases unfold to is bounded.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from amclip_ds import files
from amclip_ds.errors import UserError, in_one_line

MAX_BYTES = 256 << 10  # a run's config.yaml has 6 kB
MAX_DEPTH = 32
MAX_NODES = 20_000  # with every alias unfolded
FLOATS = (
    r"[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+",
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)",
    r"[-+]?\.(inf|Inf|INF)",
    r"\.(nan|NaN|NAN)",
)
MERGE = "tag:yaml.org,2002:merge"
BOUNDS = f"deeper than {MAX_DEPTH} levels, or of more than {MAX_NODES} values"
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def read(path: Path, *, follow: bool = True) -> Any:
    """The content of a yaml file; None for an empty one. Raises UserError of one line, which names file and place."""
    return parse(files.read_text(path, MAX_BYTES, follow=follow), str(path))


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; lists of maps by their places."""
    if isinstance(settings, list) and any(isinstance(item, dict) for item in settings):
        settings = dict(enumerate(settings))
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.")
    return found


def parse(text: str, source: str) -> Any:
    """The content of a yaml text. source: what to blame. Raises UserError of one line."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: more than the {MAX_BYTES} characters that a yaml may have")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        content = loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of 5,000 digits
        raise UserError(f"{source}: not a yaml file of plain values: {_reason(error)}") from None
    refuse_interpolation(content, source)
    return content


def refuse_interpolation(node: Any, source: str, key: str = "") -> None:
    """Raises UserError where a text holds `${`, or is the `???` that OmegaConf takes for a missing value."""
    if isinstance(node, dict):
        for name, value in node.items():
            refuse_interpolation(name, source, key)
            refuse_interpolation(value, source, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            refuse_interpolation(value, source, key)
    elif isinstance(node, str) and ("${" in node or node == "???"):
        why = "variables are filled in only in key=value words of the command" if "${" in node else "no value"
        raise UserError(f"{source}: {key or 'its text'}: {node[:60]!r} is not read here: {why}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with bounds on depth and nodes, checked before anything is built, and no key twice in a map."""

    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise ValueError(BOUNDS)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:  # before merges are laid in
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a key that is not a text (line {key.start_mark.line + 1})")
            if key.value in names and key.tag != MERGE:
                raise ValueError(f"{key.value[:60]!r} is given twice in one map (line {key.start_mark.line + 1})")
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _check(root: yaml.Node) -> None:
    """Bounds what the document unfolds to, by a count that visits each node once. Raises ValueError."""
    measured: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node, above: tuple[int, ...]) -> tuple[int, int]:
        """(values, levels) of what is at a node, its aliases unfolded."""
        line = f"(line {node.start_mark.line + 1})"
        if id(node) in above:
            raise ValueError(f"an alias that holds itself {line}")
        if node.tag not in TAGS:
            raise ValueError(f"the tag {node.tag.removeprefix('tag:yaml.org,2002:')[:60]!r} {line}")
        if id(node) not in measured:
            pairs = [] if isinstance(node.value, str) else node.value
            parts = [part for item in pairs for part in (item if isinstance(item, tuple) else (item,))]
            inner = [measure(part, (*above, id(node))) for part in parts]
            measured[id(node)] = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        size, depth = measured[id(node)]
        if size > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError(f"{BOUNDS} with its aliases unfolded {line}")
        return size, depth

    measure(root, ())


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return in_one_line(error, 200)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # a date stays a text
# 1e-3 is a number, as OmegaConf reads it; PyYAML wants 1.0e-3
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{'|'.join(FLOATS)})$"), list("-+0123456789."))
