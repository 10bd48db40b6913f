"""A user's own masks and objectives: modules that the command line names with --plugin, and installed packages.

A module's top-level dicts MASKS, TEXT_MASKS and OBJECTIVES join ours, in every rank and in every loader worker. Nothing
but a word of the command line ever causes an import here: no yaml, run folder, checkpoint or export does. This module
loads no torch.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from amclip_ds.configfile import check_options
from amclip_ds.errors import FROM_A_FILE, AmclipError, UserError, in_one_line
from amclip_ds.masks import MASKS, NONE, Mask, MaskConfig
from amclip_ds.masks.text import TEXT_MASKS, TextMask
from amclip_ds.model.config import LossConfig

GROUP = "amclip_ds.plugins"
TABLES = ("MASKS", "TEXT_MASKS", "OBJECTIVES")
SHOWN = 300  # characters of what a plug-in's error says
OURS = str(Path(__file__).parent)
OTHERS = ("/deepspeed/", "/torch/distributed/")
MACHINE_FAULTS = ("OutOfMemoryError", "AcceleratorError")
WHY_NONE = "a field is None unless the mask's `needs`, the objective's `features` or `targets` name it"


@dataclass(frozen=True)
class Plugin:
    """A module that was imported."""

    source: str
    """a module's name, or a file's absolute path"""
    name: str
    hash: str
    """sha256 of the file; of a package, of all its files"""
    text: bytes | None
    """a file's content: a process that starts later runs the same, whatever has become of the file"""

    @property
    def identity(self) -> str:
        """As it is written in config.yaml."""
        return f"{self.name} sha256:{self.hash}"

    @property
    def module(self) -> str:
        """Its module's name in sys.modules."""
        return self.source if self.text is None else FROM_A_FILE + self.name


LOADED: dict[str, Plugin] = {}  # by source, in this process


def identities() -> list[str]:
    """Of all that are loaded, as config.yaml has them."""
    return [plugin.identity for plugin in LOADED.values()]


def load(sources: Iterable[str]) -> None:
    """Imports the plug-ins, each once, and takes their masks and objectives.

    Raises UserError, in one line, for one that is missing, fails or holds something else.

    source: a file's path, the name of a module, or that of an installed package's entry point.
    """
    for source in sources:
        if source.endswith(".py") or "/" in source:
            path = Path(source).absolute()
            if str(path) not in LOADED:
                _take(_of_file(path, _read(path, source)), source)
        elif source not in LOADED:
            entry = _entry_point(source)
            module = entry.module if entry is not None else source
            if module not in LOADED:
                _take(_of_module(module, source), source)


def load_installed(names: Iterable[str]) -> None:
    """Loads the installed plug-ins that have one of these names of masks or objectives for their entry point's."""
    load(name for name in sorted(set(names)) if _entry_point(name) is not None)


def hint(name: str) -> str:
    """What to type for a mask or an objective that there is not."""
    entry = _entry_point(name)
    if entry is not None:
        return f"the installed plug-in {entry.module} has it: --plugin {name}"
    return "one of your own comes with --plugin FILE.py"


def again(plugins: Sequence[Plugin]) -> None:
    """Loads in another process what is loaded in this one (LOADED's values)."""
    for plugin in plugins:
        if plugin.source not in LOADED:
            path = Path(plugin.source)
            found = _of_module(plugin.source, plugin.name) if plugin.text is None else _of_file(path, plugin.text)
            _take(found, plugin.name)


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--plugin {source}: {error.strerror or error}") from None


def _of_file(path: Path, text: bytes) -> Plugin:
    """Runs a file as a module."""
    plugin = Plugin(str(path), path.stem, hashlib.sha256(text).hexdigest(), text)
    if plugin.module in sys.modules:
        raise UserError(f"--plugin {path}: another plug-in is called {path.stem}; give one of the files another name")
    spec = importlib.util.spec_from_loader(plugin.module, None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[plugin.module] = module  # dataclasses look their module up
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[plugin.module]
        raise UserError(f"--plugin {path}: {_import_failure(error, str(path))}") from None
    return plugin


def _of_module(name: str, source: str) -> Plugin:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"--plugin {source}: {_import_failure(error)}") from None
        raise UserError(
            f"--plugin {source}: no module of that name is installed; a file is named with its .py"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(f"--plugin {source}: {_import_failure(error)}") from None
    return Plugin(name, name, _hash_of_files(module), None)


def _hash_of_files(module: ModuleType) -> str:
    """Of a module's file; of a package's every .py."""
    file = Path(module.__file__ or "")
    if not hasattr(module, "__path__"):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for path in sorted(path for folder in module.__path__ for path in Path(folder).rglob("*.py")):
        found.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _entry_point(name: str) -> Any:
    return next((entry for entry in entry_points(group=GROUP) if entry.name == name), None)


def _take(plugin: Plugin, source: str) -> None:
    """Puts a module's masks and objectives beside ours."""
    module, who = sys.modules[plugin.module], f"--plugin {source}"
    try:
        tables = {table: _table(module, table, who) for table in TABLES}
        if not any(tables.values()):
            raise UserError(f"{who}: has nothing in a top-level dict {', '.join(TABLES)}")
        for name, mask in tables["MASKS"].items():
            _check_mask(name, mask, who)
        for name, text_mask in tables["TEXT_MASKS"].items():
            _check_text_mask(name, text_mask, who)
        if tables["OBJECTIVES"]:
            _take_objectives(tables["OBJECTIVES"], who)
    except UserError:
        if plugin.text is not None:
            del sys.modules[plugin.module]
        raise
    MASKS.update(tables["MASKS"])
    TEXT_MASKS.update(tables["TEXT_MASKS"])
    LOADED[plugin.source] = plugin


def _check_mask(name: str, mask: Any, who: str) -> None:
    if not isinstance(mask, Mask):
        raise UserError(f"{who}: MASKS[{name!r}] is a {type(mask).__name__}, not an amclip_ds.masks.Mask")
    if name == NONE or name in MASKS or name in MaskConfig.__dataclass_fields__:
        raise UserError(f"{who}: there is a mask or a key mask.{name} already; give yours another name")
    if not callable(mask.priority):
        raise UserError(f"{who}: MASKS[{name!r}].priority is no function")
    if mask.options is not None:
        check_options(mask.options, f"{who}: the options of MASKS[{name!r}]")


def _check_text_mask(name: str, mask: Any, who: str) -> None:
    if not isinstance(mask, TextMask):
        raise UserError(f"{who}: TEXT_MASKS[{name!r}] is a {type(mask).__name__}, not an amclip_ds.masks.text.TextMask")
    if name == NONE or name in TEXT_MASKS:
        raise UserError(f"{who}: there is a text mask {name} already; give yours another name")
    if not callable(mask.draw) or not callable(mask.apply):
        raise UserError(f"{who}: TEXT_MASKS[{name!r}]: draw and apply are functions")


def _take_objectives(found: dict[str, Any], who: str) -> None:
    from amclip_ds.objectives import OBJECTIVES
    from amclip_ds.objectives.base import check_declarations

    for name, kind in found.items():
        if name in OBJECTIVES or name in LossConfig.__dataclass_fields__:
            raise UserError(f"{who}: there is an objective or a key loss.{name} already; give yours another name")
        check_declarations(kind, f"{who}: OBJECTIVES[{name!r}]")
        check_options(kind.Options, f"{who}: Options of OBJECTIVES[{name!r}]")
    OBJECTIVES.update(found)


def _table(module: ModuleType, table: str, who: str) -> dict[str, Any]:
    found = getattr(module, table, {})
    if not isinstance(found, dict) or not all(isinstance(name, str) and name.isidentifier() for name in found):
        raise UserError(f"{who}: {table} is no dict whose keys are names of letters, digits and _")
    return found


@contextmanager
def blamed() -> Iterator[None]:
    """What a plug-in's own code raises inside becomes a UserError of one line, which names plug-in, part and line.

    Its own is what is raised there or in a library that it calls, but not what this package, DeepSpeed or
    torch.distributed raise below it, nor a lack of memory: those are no mistakes of the user's.
    """
    try:
        yield
    except AmclipError:
        raise
    except Exception as error:
        reported = _run_failure(error)
        if reported is None:
            raise
        raise UserError(reported) from error


def _run_failure(error: Exception) -> str | None:
    """The line about an error of a plug-in's; None where it is not one's."""
    if isinstance(error, MemoryError) or type(error).__name__ in MACHINE_FAULTS:
        return None
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        plugin = next((plugin for plugin in LOADED.values() if file.startswith(_files_of(plugin))), None)
        if plugin is not None:
            part = frame.f_code.co_qualname.replace(".<locals>", "")
            return f"plug-in {plugin.name}: {part} raised {_said(error)} ({file}, line {line}); fix it there"
        if file.startswith(OURS) or any(library in file for library in OTHERS):
            return None
    return None


def _files_of(plugin: Plugin) -> tuple[str, ...]:
    """How the names of its files begin."""
    module = sys.modules[plugin.module]
    return tuple(f"{folder}/" for folder in getattr(module, "__path__", ())) or (str(module.__file__),)


def _import_failure(error: BaseException, file: str = "") -> str:
    """`NameError: ... (line 3)`"""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return f"its import raised {_said(error)}" + (f" (line {line})" if line else "")


def _said(error: BaseException) -> str:
    text = f"{type(error).__name__}: {in_one_line(error, SHOWN)}"
    return text + (f"; {WHY_NONE}" if "NoneType" in text else "")
