# SPDX-License-Identifier: Apache-2.0
"""Which items a training step sees: pure functions of seed and step, so a resumed run agrees."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview.seeding import derive_seed


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
