"""One module of an installed package, without the imports of the package around it."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType


@functools.cache
def import_alone(package: str, name: str) -> ModuleType:
    """PACKAGE/NAME.py as a module of its own, one a process; it must import nothing of its package.

    open_clip's __init__ imports timm, torchvision, transformers and torch's compiler for a tokenizer that needs none.
    Raises ImportError where the package or the file is missing.
    """
    path = folder_of(package) / f"{name}.py"
    if not path.is_file():
        raise ImportError(f"{package} has no {name}.py", name=f"{package}.{name}")
    spec = importlib.util.spec_from_file_location(f"amclip_ds.alone.{package}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder_of(package: str) -> Path:
    """Where an installed package is; it is not imported. Raises ImportError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed", name=package)
    return Path(spec.submodule_search_locations[0])
