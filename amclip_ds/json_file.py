"""`--json FILE`, as every command has it: checked before the work, written after it."""

import json
import os
from pathlib import Path
from typing import Any

from amclip_ds import files
from amclip_ds.errors import UserError


def check(file: str | Path | None, option: str = "--json") -> None:
    """Raises UserError where the file can never be written: better now than after an hour's work."""
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{option} {path}: cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
        raise UserError(f"{option} {path}: cannot be written: permission denied")


def write(file: str | Path | None, content: Any, option: str = "--json") -> None:
    """Writes it whole, or into a pipe or device as it is. None: nothing is asked for. Raises UserError, AmclipError."""
    if file is None:
        return
    path, text = Path(file), json.dumps(content, indent=1) + "\n"
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
        else:
            files.write_atomically(path, text)
    except OSError as error:
        raise files.not_written(f"{option} {path}:", error) from None
