"""The order of samples: complete, repeatable from any position, sequential within a shard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amclip_ds.data.order import EpochOrder, Mixture

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def order_of(counts: list[int], seed: int = 0, epoch: int = 0, open_shards: int = 3, window: int = 16) -> EpochOrder:
    every = np.array(counts)
    return EpochOrder(every, Mixture(np.zeros(len(counts), int), (1.0,)), seed, epoch, open_shards, window)


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 5), open_shards=st.integers(1, 5), window=st.integers(1, 64))
def test_every_sample_comes_once_an_epoch(counts: list[int], seed: int, open_shards: int, window: int) -> None:
    order = order_of(counts, seed, 1, open_shards, window)
    rows = order.locate(0, order.length)
    assert order.length == sum(counts) == len(rows)
    assert {(shard, within) for shard, within, _ in rows.tolist()} == {
        (shard, within) for shard, count in enumerate(counts) for within in range(count)
    }


@settings(max_examples=150, deadline=None)
@given(counts=COUNTS, cuts=st.lists(st.floats(0, 1), min_size=2, max_size=2), window=st.integers(1, 64))
def test_any_part_asked_afresh_is_the_same_part_of_the_whole(counts: list[int], cuts: list[float], window: int) -> None:
    whole = order_of(counts, window=window).locate(0, sum(counts))
    start, stop = sorted(int(cut * sum(counts)) for cut in cuts)
    assert np.array_equal(order_of(counts, window=window).locate(start, stop), whole[start:stop])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [order_of([30, 30, 30], seed, epoch).locate(0, 90) for seed in (0, 1) for epoch in (0, 1)]
    assert all(not np.array_equal(orders[i], orders[j]) for i in range(4) for j in range(i))
    within = [order_of([30], seed, epoch).locate(0, 30) for seed in (0, 1) for epoch in (0, 1)]  # nothing but windows
    assert all(not np.array_equal(within[i], within[j]) for i in range(4) for j in range(i))


def test_a_shard_is_read_from_front_to_back_a_window_at_a_time() -> None:
    """Within a window samples are shuffled; a later window never goes back in a shard, so reads stay sequential."""
    order = order_of([200, 200, 200, 200], open_shards=2, window=40)
    rows = order.locate(0, order.length)
    done: dict[int, int] = {}
    for start in range(0, len(rows), 40):
        window = rows[start : start + 40]
        for shard in set(window[:, 0].tolist()):
            places = window[window[:, 0] == shard, 1]
            assert places.min() >= done.get(shard, 0), "a window reads what an earlier one has passed"
            done[shard] = int(places.max())
        assert len(set(window[:, 0].tolist())) == 2, "neighbours come from several open shards"
        assert not np.array_equal(np.sort(window[:, 1]), window[:, 1]), "a window is shuffled"


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.5, 1.0), (0.0, 3.0), (1.5, 0.25)])
def test_a_weight_says_how_often_a_source_comes(weights: tuple[float, float]) -> None:
    counts = np.array([40, 10, 30, 20])
    order = EpochOrder(counts, Mixture(np.array([0, 0, 1, 1]), weights), 0, 0, 3, 16)
    rows = order.locate(0, order.length)
    seen = [int((rows[:, 0] < 2).sum()), int((rows[:, 0] >= 2).sum())]
    assert seen == [round(50 * weights[0]), round(50 * weights[1])]
    assert len({tuple(row) for row in rows.tolist()}) == order.length, "copies of a sample are distinguished"


def test_with_replacement_every_sample_has_the_same_chance_regardless_of_its_shards_size() -> None:
    counts, drawn = np.array([100, 300] * 20), np.zeros(40)
    for epoch in range(30):
        order = EpochOrder(counts, Mixture(np.zeros(40, int), (1.0,), with_replacement=True), 0, epoch, 4, 64)
        rows = order.locate(0, order.length)
        assert order.length == counts.sum()
        drawn += np.bincount(rows[:, 0], minlength=40)
    assert 2.5 < drawn[1::2].sum() / drawn[::2].sum() < 3.5
    assert drawn.max() > 1.2 * 30 * 300, "with replacement, some shard came more often than once an epoch"


def test_spans_hold_exactly_what_a_window_reads() -> None:
    order = order_of([50, 3, 70], open_shards=2, window=20)
    rows = order.locate(0, order.length)
    by_window: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for position, (shard, within, _) in enumerate(rows.tolist()):
        by_window.setdefault(order.window_at(position), set()).add((shard, within))
    for (group, window), samples in by_window.items():
        spans = order.spans(group, window)
        assert samples == {(shard, i) for shard, first, last in spans for i in range(first, last)}


def test_sources_without_a_sample_make_no_order() -> None:
    """As those that are left when the only weight above 0 is of an empty tar: the loader says what is wrong."""
    counts, sources = np.array([0, 5]), np.array([0, 1])
    for with_replacement in (False, True):
        mixture = Mixture(sources, (1.0, 0.0), with_replacement)
        assert EpochOrder(counts, mixture, 0, 0, 3, 16).length == 0
