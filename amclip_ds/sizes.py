"""Sizes of memory as people write them."""

import re

from amclip_ds.errors import UserError

GIB = 1024.0**3


def read_size(text: str) -> float:
    """--gpu-memory: '80GB', '24G' or '512MiB' in bytes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match.group(1)):
        raise UserError(f"--gpu-memory: {text!r} is no size; write it as 80GB")
    base = 1024 if match.group(3) else 1000
    return float(match.group(1)) * base ** " KMGT".index(match.group(2).upper() or " ")
