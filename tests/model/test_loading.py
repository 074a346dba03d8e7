# SPDX-License-Identifier: Apache-2.0
import torch

from cogview.data.digits import DigitPairs
from cogview.data.loading import training_images
from cogview.data.order import StepBatches, batch_indices


def test_workers_read_the_same_batches_in_the_same_order():
    pairs = DigitPairs("test")
    order = StepBatches(3, 16, len(pairs), range(21, 26))
    expected = [
        torch.stack([pairs.image(index, 8) for index in batch_indices(3, step, 16, len(pairs))])
        for step in range(21, 26)
    ]
    for workers in (0, 1):
        got = list(training_images(pairs, 8, order, workers))
        assert len(got) == len(order) == 5
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_loading_draws_nothing_from_the_global_generator():
    pairs = DigitPairs("test")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(training_images(pairs, 8, StepBatches(0, 4, len(pairs), range(2))))
    assert torch.rand(1) == expected
