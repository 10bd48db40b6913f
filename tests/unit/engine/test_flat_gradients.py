"""What is copied into the buffer of a round of gradients, and by how many operators."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amclip_ds.engine.flat_gradients import Piece, Round, fill


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def filled(turn: Round, gradients: list[Tensor | None]) -> Tensor:
    buffer = torch.zeros(turn.length)
    for piece in turn.pieces:
        gradient = gradients[piece.gradient]
        if gradient is not None:
            buffer[piece.place : piece.place + piece.length] = gradient[piece.start : piece.start + piece.length]
    return buffer


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("missing", [(), (0,), (2, 3), (5,), range(6)])
@pytest.mark.parametrize("left_out", [0, 2])
def test_pieces_are_at_their_places_and_zeros_between(gap: int, missing: tuple[int, ...], left_out: int) -> None:
    """left_out: elements at each end of a gradient that another rank's round has."""
    gradients = [None if item in missing else torch.randn(7 + item) for item in range(6)]
    place, turn = gap, Round(0, 0, [])
    for item in range(6):
        length = 7 + item - 2 * left_out
        turn.pieces.append(Piece(item, left_out, place, length))
        place += length + gap
    turn.length = place
    buffer = torch.full((turn.length,), torch.nan)
    fill(buffer, turn, gradients)
    assert torch.equal(buffer, filled(turn, gradients))


def test_whole_gradients_without_gaps_take_three_operators() -> None:
    """Cutting the buffer, zeros for its end, one copy: on a GPU the host has a view fewer to make for every tensor."""
    gradients: list[Tensor | None] = [torch.randn(4) for _ in range(300)]
    turn = Round(0, 1201, [Piece(item, 0, 4 * item, 4) for item in range(300)])
    buffer = torch.full((1201,), torch.nan)
    with Operators() as seen:
        fill(buffer, turn, gradients)
    assert seen.count == 3 and torch.equal(buffer, filled(turn, gradients))
