import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclip_ds.model import scoring
from amclip_ds.model.vision import VisionTower
from benchmarks.tensor_memory import TensorMemory
from tests.unit.model import tiny


def full_map_scores(tower: VisionTower, images: Tensor) -> Tensor:
    """The published way: every attention matrix of every block, whole."""
    x, _ = tower._embed(images, (), None, 1)
    maps = []
    for block in tower.blocks:
        attn = block.attn
        B, T, _ = x.shape
        q, k, _ = attn.qkv(block.norm1(x)).reshape(B, T, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.transpose(-2, -1) * attn.scale).softmax(-1))
        x = block(x)
    return torch.stack(maps)[:, :, :, 0, 1:].mean(dim=(0, 2))


@pytest.fixture
def tower() -> VisionTower:
    return tiny.student().vision


def test_scores_are_the_mean_cls_row_of_all_blocks_and_heads(tower: VisionTower) -> None:
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(4)  # attention that is not nearly uniform
        images = torch.randn(3, 3, 32, 32)
        output = tower(images, with_scores=True)
        cls, scores = output.cls, output.scores
        expected = full_map_scores(tower, images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(scores, expected, atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(cls, tower(images).cls, atol=1e-6, rtol=1e-6)  # the same feature on both paths
        with pytest.raises(AssertionError):  # the twin: one block less
            tower.blocks = tower.blocks[:-1]
            torch.testing.assert_close(full_map_scores(tower, images), expected, atol=1e-8, rtol=1e-5)


def test_scores_are_not_renormalised_without_cls(tower: VisionTower) -> None:
    with torch.no_grad():
        scores = tower(torch.randn(2, 3, 32, 32), with_scores=True).scores
    assert (scores.sum(-1) < 1).all() and (scores > 0).all()


def test_no_attention_map_is_ever_held() -> None:
    tower = VisionTower(tiny.vision_config(image_size=224, patch_size=16, width=16, heads=4, depth=1))
    images = torch.randn(2, 3, 224, 224)
    whole_map = 2 * 4 * 197 * 197
    with torch.no_grad(), TensorMemory() as seen:
        tower(images, with_scores=True)
    with torch.no_grad(), TensorMemory() as published:
        full_map_scores(tower, images)
    assert published.largest_numel >= whole_map
    images_and_patches = 2 * 3 * (224 * 224 + 16 * 16)  # and a row for the class token
    assert seen.largest_numel <= images_and_patches < whole_map


def slow_views(scores: Tensor, boxes: Tensor, side: int, grid: int, unit: int, antialias: bool = False) -> Tensor:
    """Sample by sample, in pixels: map to the teacher's box, crop at the view, to the view's grid, to the units."""
    out = []
    for view in boxes[:-1]:
        rows = []
        for sample, (top, left, height, width) in enumerate(view.tolist()):
            t_top, t_left, t_height, t_width = boxes[-1, sample].tolist()
            full = F.interpolate(scores[sample].reshape(1, 1, side, side), (t_height, t_width), mode="bilinear")
            crop = torch.zeros(1, 1, height, width)
            y0, x0 = max(top, t_top), max(left, t_left)
            y1, x1 = min(top + height, t_top + t_height), min(left + width, t_left + t_width)
            if y1 > y0 and x1 > x0:
                inside = full[:, :, y0 - t_top : y1 - t_top, x0 - t_left : x1 - t_left]
                crop[:, :, y0 - top : y1 - top, x0 - left : x1 - left] = inside
            size = grid if side > grid // unit else grid // unit
            view_map = F.interpolate(crop, (size, size), mode="bilinear", antialias=antialias)
            if size != grid // unit:
                view_map = F.interpolate(view_map, (grid // unit, grid // unit), mode="bilinear")
            rows.append(view_map.flatten())
        out.append(torch.stack(rows))
    return torch.stack(out)


def random_boxes(samples: int, seed: int) -> Tensor:
    """Boxes (top, left, height, width) in pixels; views may be partly outside the teacher's box."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(20, 300, (3, samples, 2), generator=draw)
    corner = torch.randint(0, 100, (3, samples, 2), generator=draw)
    return torch.cat([corner, size], dim=-1)


@pytest.mark.parametrize(("side", "grid", "unit"), [(14, 14, 2), (14, 14, 1), (7, 14, 2), (8, 8, 2), (4, 8, 2)])
def test_one_call_equals_the_slow_form(side: int, grid: int, unit: int) -> None:
    scores = torch.rand(40, side * side, generator=torch.Generator().manual_seed(0)) / side**2
    boxes = random_boxes(40, seed=side * grid)
    ours = scoring.scores_to_views(scores, boxes, grid, unit)
    expected = slow_views(scores, boxes, side, grid, unit)
    assert ours.shape == (2, 40, (grid // unit) ** 2)
    torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-5)
    wrong = slow_views(scores, boxes, side, grid, unit, antialias=True)
    with pytest.raises(AssertionError):  # the twin: antialiasing is another map
        torch.testing.assert_close(ours, wrong, atol=1e-8, rtol=1e-5)


def test_a_view_equal_to_the_teachers_box_keeps_its_map() -> None:
    scores = torch.rand(5, 196)
    boxes = torch.tensor([3, 4, 210, 210]).expand(2, 5, 4)  # 15 pixels a patch: its middle is a pixel
    torch.testing.assert_close(scoring.scores_to_views(scores, boxes, 14, 1)[0], scores, atol=1e-5, rtol=0)


def test_blocks_are_the_mean_of_their_tokens() -> None:
    scores = torch.rand(5, 196)
    boxes = random_boxes(5, seed=3)
    tokens = scoring.scores_to_views(scores, boxes, 14, 1).reshape(2, 5, 7, 2, 7, 2)
    torch.testing.assert_close(scoring.scores_to_views(scores, boxes, 14, 2), tokens.mean(dim=(3, 5)).flatten(-2))


@pytest.mark.parametrize("side", [8, 4])  # of the teacher's map: finer than the units, and as the units (A-CLIP-eff)
def test_scores_of_a_mirrored_view_are_mirrored(side: int) -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, side * side)
    boxes = torch.tensor([[4.0, 8.0, 40.0, 30.0], [0.0, 0.0, 64.0, 64.0], [0.0, 0.0, 64.0, 64.0]])[:, None].expand(
        3, 3, 4
    )
    flips = torch.tensor([[True, False, True], [False, False, True]])
    plain = scoring.scores_to_views(scores, boxes, grid=8, unit=2).unflatten(-1, (4, 4))
    mirrored = scoring.scores_to_views(scores, boxes, grid=8, unit=2, flips=flips).unflatten(-1, (4, 4))
    assert torch.equal(mirrored[flips], plain[flips].flip(-1)) and torch.equal(mirrored[~flips], plain[~flips])
