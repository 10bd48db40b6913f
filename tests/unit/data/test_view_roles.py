"""Views with roles: what one has of its own is there, and moves nothing of the others'."""

from pathlib import Path

import numpy as np
import pytest
import torch

from amclip_ds.data.batch import Batch
from amclip_ds.data.config import ViewConfig
from tests.unit.data.shards import open_data, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, (40,))  # small enough that one view decides no other one's reduction in decoding
    return folder


def batch(shards: Path, *views: ViewConfig, **changes: object) -> Batch:
    given = {"views": list(views)} if views else {}
    return next(open_data(shards, **given, **changes).batches(None))


def same(one: Batch, other: Batch, *views: int) -> bool:
    """Whether everything of these views, and of the teacher, is alike."""
    at = list(views)
    assert one.teacher_uint8 is not None and other.teacher_uint8 is not None
    return bool(
        torch.equal(one.views_uint8[at], other.views_uint8[at])
        and torch.equal(one.boxes[at], other.boxes[at])
        and np.array_equal(one.photometric.table[at], other.photometric.table[at])
        and torch.equal(one.mask_noise[at], other.mask_noise[at])
        and torch.equal(one.boxes[-1], other.boxes[-1])
        and torch.equal(one.teacher_uint8, other.teacher_uint8)
        and torch.equal(one.token_ids, other.token_ids)
    )


def test_a_flip_mirrors_half_of_one_view_and_nothing_else(shards: Path) -> None:
    plain, flipped = batch(shards, global_batch=40), batch(shards, ViewConfig(), ViewConfig(flip=True), global_batch=40)
    assert flipped.flips is not None and plain.flips is None
    assert not flipped.flips[0].any() and 10 < flipped.flips[1].sum() < 30
    mirrored = torch.where(flipped.flips[..., None, None, None], plain.views_uint8.flip(-1), plain.views_uint8)
    assert torch.equal(flipped.views_uint8, mirrored) and torch.equal(flipped.boxes, plain.boxes)
    assert same(plain, flipped, 0) and torch.equal(plain.mask_noise, flipped.mask_noise)


def test_the_same_crop_is_the_same_picture(shards: Path) -> None:
    two = batch(shards, ViewConfig(flip=True), ViewConfig(), ViewConfig())
    made = batch(shards, ViewConfig(flip=True), ViewConfig(same_crop_as=0), ViewConfig(same_crop_as=1))
    assert two.flips is not None and made.flips is not None and made.flips[0].any()
    for view in (1, 2):  # the last through the one before
        assert torch.equal(made.views_uint8[view], made.views_uint8[0])
        assert torch.equal(made.boxes[view], made.boxes[0]) and torch.equal(made.flips[view], made.flips[0])
        assert np.array_equal(made.photometric.table[view], made.photometric.table[0])
        assert not torch.equal(made.mask_noise[view], made.mask_noise[0])  # another mask of it
    assert torch.equal(made.views_uint8[0], two.views_uint8[0]) and torch.equal(made.mask_noise, two.mask_noise)


def test_the_other_views_do_not_move(shards: Path) -> None:
    own = batch(shards, ViewConfig(), ViewConfig(), ViewConfig(), teacher_contains=False)
    for view in (
        ViewConfig(photometric=False),
        ViewConfig(flip=True),
        ViewConfig(scale=[0.1, 0.2]),
        ViewConfig(ratio=[1.0, 1.0]),
    ):
        assert same(own, batch(shards, ViewConfig(), view, ViewConfig(), teacher_contains=False), 0, 2)
    assert not same(own, batch(shards, ViewConfig(), ViewConfig(scale=[0.1, 0.2]), ViewConfig()), 1)


def test_each_view_has_its_own_scale_and_colours(shards: Path) -> None:
    made = batch(shards, ViewConfig(scale=[0.9, 1.0]), ViewConfig(scale=[0.05, 0.1], photometric=False))
    area = made.boxes[:2, :, 2] * made.boxes[:2, :, 3] / (24 * 20)
    assert (area[0] > 0.8).all() and (area[1] < 0.15).all()
    assert not made.photometric.table[1].any() and made.photometric.table[0].any()


def test_a_second_draw_comes_after_all_others_and_is_the_sample_s(shards: Path) -> None:
    one, two = batch(shards), batch(shards, draws_twice=True)
    assert one.mask_noise2 is None and two.mask_noise2 is not None
    assert same(one, two, 0, 1) and two.mask_noise2.shape == two.mask_noise.shape
    assert not torch.equal(two.mask_noise, two.mask_noise2) and 0.3 < two.mask_noise2.mean() < 0.7
    ranks = [batch(shards, draws_twice=True, rank=rank, world_size=2) for rank in range(2)]
    halves = [part.mask_noise2 for part in ranks if part.mask_noise2 is not None]
    assert torch.equal(torch.cat(halves, 1), two.mask_noise2)


def test_hidden_words_are_the_samples_own_and_move_nothing(shards: Path) -> None:
    plain, hidden = batch(shards, global_batch=40), batch(shards, global_batch=40, hidden_share=0.4)
    assert plain.cloze_ids is None and hidden.cloze_ids is not None and same(plain, hidden, 0, 1)
    ids = hidden.cloze_ids
    assert torch.equal(torch.where(ids < 0, ~ids, ids), hidden.token_ids)
    assert ((ids < 0).sum(1) == 2).all()  # of "picture N of shard 0", 5 or 6 tokens
    assert hidden.text_lengths["cloze"] == hidden.text_lengths["plain"]
    second = batch(shards, global_batch=40, hidden_share=0.4, rank=1, world_size=2).cloze_ids
    assert second is not None and torch.equal(second, ids[20:, : second.shape[1]])
