"""What a step hands to whom."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from amclip_ds.data import photometric
from amclip_ds.step import teachers_images


def test_the_teachers_crop_is_normalised_by_the_function_given() -> None:
    """The engine's, compiled; a view of the student's is normalised already."""
    crop, views = (torch.full((*lead, 3, 4, 4), 7, dtype=torch.uint8) for lead in ((2,), (1, 2)))
    batch: Any = SimpleNamespace(teacher_uint8=crop, views_uint8=views + 1)
    seen: list[Tensor] = []

    def normalise(images_uint8: Tensor) -> Tensor:
        seen.append(images_uint8)
        return photometric.normalise(images_uint8)

    for view, images in ((None, crop), (0, batch.views_uint8[0])):
        method: Any = SimpleNamespace(sees_views=False, teacher_view=view)
        found = teachers_images(batch, views.float(), method, normalise)
        assert torch.equal(seen.pop(), images) and torch.equal(found, photometric.normalise(images))
        assert torch.equal(found, teachers_images(batch, views.float(), method))
    method = SimpleNamespace(sees_views=True, teacher_view=None)
    assert teachers_images(batch, views, method, normalise) is views and not seen
