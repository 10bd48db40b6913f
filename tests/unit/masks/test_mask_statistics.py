"""What masks do, in numbers: of choices whose answer is evident."""

import pytest
import torch

from amclip_ds.pictures.mask_statistics import object_share, of_step, overlap

GRID = 4
WHOLE = [0.0, 0.0, 64.0, 64.0]
LOWER_RIGHT = [32.0, 32.0, 32.0, 32.0]


def boxes(*views: list[float]) -> torch.Tensor:
    return torch.tensor([[view] for view in views])


def rows(*patches: int) -> torch.Tensor:
    return torch.tensor([list(patches)])


def test_a_whole_image_and_its_corner_share_what_is_in_both() -> None:
    """Patches 10, 11, 14, 15 of the whole are the corner, each four of its own."""
    views = boxes(WHOLE, LOWER_RIGHT)
    kept = [rows(0, 10), rows(0, 1, 4, 15)]
    assert float(overlap(0, 1, kept, views, GRID)) == 0  # 10's centre is the corner of four: it is in its patch 5
    assert float(overlap(1, 0, kept, views, GRID)) == 0.75
    assert float(overlap(0, 1, [rows(0, 10), rows(5)], views, GRID)) == 0.5


def test_mirrored_views_meet_where_they_show_the_same() -> None:
    views, flips = boxes(WHOLE, WHOLE), torch.tensor([[False], [True]])
    assert float(overlap(0, 1, [rows(0, 4), rows(3, 7)], views, GRID, flips)) == 1
    assert float(overlap(1, 0, [rows(0, 4), rows(3, 7)], views, GRID, flips)) == 1
    assert float(overlap(0, 1, [rows(0, 4), rows(3, 7)], views, GRID)) == 0


def test_numbers_of_a_step() -> None:
    views = boxes(WHOLE, WHOLE, WHOLE)
    even, one = torch.full((1, 9), 0.1), torch.zeros(1, 9)
    one[0, 3] = 1
    found = of_step([rows(0, 1), None, rows(1, 2)], even, views, GRID)
    assert found == pytest.approx({"mask_kept": (0.125 + 1 + 0.125) / 3, "mask_overlap": 0.5, "mask_score_entropy": 1})
    assert of_step([rows(0)], one, views[:1], GRID) == {"mask_kept": 1 / 16, "mask_score_entropy": 0}
    assert of_step([rows(0)], one.expand(2, 1, 9), views[:1], GRID)["mask_score_entropy"] == 0
    assert of_step([None, None], None, views[:2], GRID) == {}


def test_the_objects_share_is_of_masked_views_that_show_it() -> None:
    views, objects = boxes(WHOLE, LOWER_RIGHT), torch.tensor([[0.0, 0.0, 32.0, 32.0]])
    assert object_share([rows(0, 1, 10), rows(0)], objects, views, GRID) == 0.5  # the corner shows none of it
    assert object_share([None, rows(0)], objects, views, GRID) is None
    assert object_share([rows(0)], None, views[:1], GRID) is None
