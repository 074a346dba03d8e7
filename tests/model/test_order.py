# SPDX-License-Identifier: Apache-2.0
import tracemalloc

import numpy as np
import pytest

from cogview.data.order import FEW, batch_indices, permuted


def test_every_epoch_visits_every_item_once():
    visited = [index for step in range(14) for index in batch_indices(3, step, 5, 7)]
    for epoch in range(10):
        assert sorted(visited[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert visited[:7] != visited[7:14]


def test_a_batch_may_hold_many_epochs():
    assert sorted(batch_indices(0, 3, 12, 3)) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("length", [1, 2, 3, FEW, FEW + 1, 4096, 4097])
def test_places_are_permuted_and_each_on_its_own(length):
    places = np.arange(length)
    order = permuted(places, 1, length)
    assert sorted(order.tolist()) == list(range(length))
    assert np.array_equal(permuted(places[::3], 1, length), order[::3])
    if length > 3:
        assert not np.array_equal(permuted(places, 2, length), order)


@pytest.mark.parametrize(("length", "orders"), [(8, 300), (FEW + 8, 20)])
def test_every_item_comes_anywhere_about_equally_often(length, orders):
    """Chi-square of 8 x 8 ranges of places and items, far in its tail."""
    counts, places = np.zeros((8, 8)), np.arange(length)
    for seed in range(orders):
        np.add.at(counts, (places * 8 // length, permuted(places, seed, length) * 8 // length), 1)
    expected = orders * length / 64
    assert ((counts - expected) ** 2 / expected).sum() < 95  # 49 degrees of freedom: 1 in 10,000


def test_neighbours_in_the_order_are_no_neighbours_in_the_data():
    length = 30_000
    order = permuted(np.arange(length), 5, length)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    gaps = np.sort(np.diff(order) % length) / length
    assert np.abs(gaps - np.linspace(0, 1, len(gaps))).max() < 0.015  # Kolmogorov-Smirnov: 1 in 100,000


def test_a_step_costs_no_memory_for_items_that_it_does_not_see():
    tracemalloc.start()
    batch_indices(0, 123_456, 64, 30_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
