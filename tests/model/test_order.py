# SPDX-License-Identifier: Apache-2.0
from cogview.data.order import batch_indices


def test_every_epoch_visits_every_item_once():
    visited = [index for step in range(14) for index in batch_indices(3, step, 5, 7)]
    for epoch in range(10):
        assert sorted(visited[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert visited[:7] != visited[7:14]
