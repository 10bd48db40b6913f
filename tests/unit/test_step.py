"""What a step hands to whom."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from amclip_ds import step
from amclip_ds.comm import SingleProcess
from amclip_ds.data import photometric
from amclip_ds.step import NOTHING_OBSERVED, teachers_images, train_step


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


TEXTS = ("token_ids", "masked_ids", "cloze_ids")


class Encoding(Exception):
    """The step has come to its student's forward pass."""


def test_a_step_has_the_crop_normalised_by_its_engine_and_lets_go_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled there: uncompiled, each step would take longer, and nothing else would show it. Kept, it would be 154 MB
    of the peak at 256 samples."""
    crop = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    batch: Any = SimpleNamespace(
        teacher_uint8=crop, views_uint8=crop[None], photometric=None, text_lengths={}, **dict.fromkeys(TEXTS)
    )
    normalised: list[Tensor] = []
    seen: list[weakref.ref[Tensor]] = []

    def normalise(images_uint8: Tensor) -> Tensor:
        normalised.append(images_uint8)
        return photometric.normalise(images_uint8)

    def observe(images: Tensor, *words: Any) -> Any:
        assert torch.equal(images, photometric.normalise(crop))
        seen.append(weakref.ref(images))
        return NOTHING_OBSERVED

    def forward_backward(*words: Any) -> None:
        assert [image() for image in seen] == [None]
        raise Encoding

    monkeypatch.setattr(step, "forward_backward", forward_backward)
    method: Any = SimpleNamespace(
        reads_teacher=True, sees_views=False, teacher_view=None, wants=None, reads_frozen=False, texts=()
    )
    method.groups = lambda progress: ()
    method.at = lambda progress: method
    method.changes = lambda before, now: False
    student: Any = SimpleNamespace(
        set_lr=lambda lr, progress: None,
        change_views=lambda views, draws: views.float(),
        normalise=normalise,
        scores_to_views=None,
    )
    teacher: Any = SimpleNamespace(observe=observe)
    schedules: Any = SimpleNamespace(lr=lambda updates: 0.0, progress=lambda updates: 0.0)
    guards: Any = SimpleNamespace(admit=None)
    with pytest.raises(Encoding):
        train_step(batch, student, teacher, schedules, 0, method, SingleProcess(), 2, guards)
    assert len(normalised) == 1 and normalised[0] is crop
