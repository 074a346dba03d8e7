# SPDX-License-Identifier: Apache-2.0
"""Which items a training step sees: pure functions of seed and step, so a resumed run agrees."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from cogview.seeding import derive_seed


@lru_cache(maxsize=4)  # A step needs one order or two, and the next step the same ones.
def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """The permutation in which an epoch visits its items: a pure function, so a resumed run agrees."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(length, generator=generator)


def batch_indices(seed: int, step: int, batch_size: int, length: int) -> list[int]:
    """Items of one step, running through one epoch after another; a batch may straddle two."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), length)
        indices += epoch_order(seed, epoch, length)[offset : offset + batch_size - len(indices)].tolist()
    return indices


class StepBatches(Sampler[list[int]]):
    """:func:`batch_indices` of several steps, as a batch sampler for PyTorch's DataLoader."""

    def __init__(self, seed: int, batch_size: int, length: int, steps: range) -> None:
        self.seed, self.batch_size, self.length, self.steps = seed, batch_size, length, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield batch_indices(self.seed, step, self.batch_size, self.length)
