"""The folders of committed checkpoints, RUN/checkpoints/step_XXXXXXXX: which names are ours. Loads no torch."""

import os
import re
from pathlib import Path

from amclip_ds.files import not_read

STEP_FOLDER = re.compile(r"step_([0-9]{8,12})")


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def list_steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """The committed folders, oldest first, valid or not. Raises UserError where it is no folder that can be read."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise not_read(f"{checkpoints}: cannot be read", error) from None
    steps = [(int(match[1]), match[0]) for name in names if (match := STEP_FOLDER.fullmatch(name))]
    return sorted((step, checkpoints / name) for step, name in steps if name == folder_name(step))
