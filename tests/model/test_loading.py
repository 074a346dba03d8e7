# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

from cogview.data.digits import DigitPairs
from cogview.data.loading import training_batches, training_images
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


def test_batches_come_in_order_from_processes_of_another_group():
    """What a terminal or a job scheduler sends to the group of a training must not end its workers."""
    for workers in (0, 2):
        got = list(training_batches(_step_and_group, range(3, 9), workers))
        assert [step for step, _ in got] == list(range(3, 9))
        assert all((group == os.getpgrp()) == (workers == 0) for _, group in got)


def _step_and_group(step):
    return step, os.getpgrp()


class _Gone(DigitPairs):
    """Digits of which one is there no longer."""

    def image(self, index, size):
        if index == 5:
            raise FileNotFoundError("image not found: 5.png")
        return super().image(index, size)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_told_in_the_same_words_whichever_process_reads(workers):
    batches = iter(training_images(_Gone("test"), 8, [[3, 4], [5, 6]], workers))
    assert next(batches).shape == (2, 3, 8, 8)
    with pytest.raises(FileNotFoundError, match=r"^image not found: 5\.png$"):
        next(batches)
