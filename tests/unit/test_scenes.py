"""Which patches belong to a scene's object, and how much of it a mask keeps."""

import pytest
import torch

from amclip_ds.demo.scenes import MaskedScenes, patches_inside


def test_an_object_is_found_in_the_coordinates_of_each_view() -> None:
    whole, lower_right = [0.0, 0.0, 64.0, 64.0], [32.0, 32.0, 32.0, 32.0]
    inside = patches_inside(torch.tensor([[32.0, 48.0, 16.0, 16.0]]), torch.tensor([[whole], [lower_right]]), grid=8)
    assert inside[0, 0].reshape(8, 8).nonzero().tolist() == [[4, 6], [4, 7], [5, 6], [5, 7]]
    # The same object fills the upper right quarter of the view that shows the lower right quarter of the scene.
    assert inside[1, 0].reshape(8, 8)[:4, 4:].all() and inside[1, 0].sum() == 16


def looks(kept: torch.Tensor) -> MaskedScenes:
    is_object = torch.zeros(1, 1, 16, dtype=torch.bool)
    is_object[..., :4] = True
    image = torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)
    return MaskedScenes(image, image[0], torch.zeros(1, 16), {"attentive": list(kept)}, is_object, ["a red ring"])


def test_the_share_kept() -> None:
    assert looks(torch.tensor([[[0, 1, 2, 9]]])).object_kept("attentive") == pytest.approx(0.75)
    assert looks(torch.tensor([[[8, 9, 10, 11]]])).object_kept("attentive") == 0.0


def test_an_object_is_on_the_other_side_of_a_mirrored_view() -> None:
    object_boxes, views = torch.tensor([[8.0, 0.0, 8.0, 16.0]]), torch.tensor([[[0.0, 0.0, 64.0, 64.0]]])
    plain = patches_inside(object_boxes, views, 8).reshape(8, 8)
    mirrored = patches_inside(object_boxes, views, 8, torch.tensor([[True]])).reshape(8, 8)
    assert plain.nonzero().tolist() == [[1, 0], [1, 1]] and torch.equal(mirrored, plain.flip(-1))
