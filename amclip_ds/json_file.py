"""`--json FILE`, as every command has it: checked before the work, written after it."""

import json
from pathlib import Path
from typing import Any

from amclip_ds import files


def check(file: str | Path | None, option: str = "--json") -> None:
    """Raises UserError where the file can never be written, or holds what is no JSON."""
    if file is None:
        return
    files.check_output(Path(file), option, (b"{", b"["))


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
