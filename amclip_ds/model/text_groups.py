"""Which texts are taken together, so that few places are padded: a plan made on the host from their lengths."""

from collections.abc import Sequence
from typing import NamedTuple

GROUPS = 4
STEP = 8  # a group's length is a multiple of it: few shapes, which a compiler can keep
MAX_SHARE = 0.85  # of the tokens: where more than that is left, texts are not taken apart


class TextGroup(NamedTuple):
    rows: list[int]
    """places in the batch"""
    length: int
    """tokens that the longest of them has, rounded up"""


def groups_of(lengths: Sequence[int], longest: int, fixed_shapes: bool = False) -> list[TextGroup]:
    """Equal parts of the batch, sorted by length; one group where that saves too little. longest: places of the batch.

    fixed_shapes: always as many groups of as many texts, or one of all where all are of one length, so that shapes
    differ in little but the length.
    """
    B = len(lengths)
    if B % GROUPS or B < 2 * GROUPS:
        return [TextGroup(list(range(B)), longest)]
    order = sorted(range(B), key=lambda row: lengths[row])
    groups: list[TextGroup] = []
    for start in range(0, B, B // GROUPS):
        rows = order[start : start + B // GROUPS]
        length = min(longest, -(-lengths[rows[-1]] // STEP) * STEP)
        if groups and groups[-1].length == length and not fixed_shapes:
            rows = groups.pop().rows + rows
        groups.append(TextGroup(rows, length))
    if groups[0].length == groups[-1].length:  # sorted: all are
        return [TextGroup(list(range(B)), groups[0].length)]
    if not fixed_shapes and sum(len(rows) * length for rows, length in groups) > MAX_SHARE * B * longest:
        return [TextGroup(list(range(B)), longest)]
    return groups
