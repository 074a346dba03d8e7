# SPDX-License-Identifier: Apache-2.0
"""Which items a training step sees: pure functions of seed and step, so a resumed run agrees.

The order of many items is a keyed permutation that is computed place by place (a Feistel network on the
bits of the place, with cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
Neither time nor memory of a step depends on the number of items, and any part of a batch can be computed on
its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from cogview.seeding import derive_seed

FEW = (
    1024  # So many items are sorted by random numbers: on their few bits the network knows few permutations.
)
ROUNDS = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step of SplitMix64


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Thoroughly mixed bits of ``values + key``: the finalizer of SplitMix64. uint64, wrapping."""
    values = values + key
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permuted(places: np.ndarray, seed: int, length: int) -> np.ndarray:
    """Where a permutation of ``range(length)``, one for each seed, takes ``places``; int64.

    ``length`` is at most 2**62.
    """
    keys = [np.uint64(derive_seed(seed, "round", number)) for number in range(ROUNDS)]
    if length <= FEW:
        return np.argsort(_mix(np.arange(length, dtype=np.uint64) * GOLDEN, keys[0]), kind="stable")[places]
    bits = (length - 1).bit_length()
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = ((np.uint64(1) << half) - np.uint64(1) for half in (low_bits, high_bits))

    def once(values: np.ndarray) -> np.ndarray:
        high, low = values >> low_bits, values & low_mask
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high = high ^ (_mix(low, first) & high_mask)
            low = low ^ (_mix(high, second) & low_mask)
        return (high << low_bits) | low

    found = once(np.asarray(places).astype(np.uint64))
    # The network permutes a power of two. Where it leaves the range, it is applied again until it comes back.
    while len(outside := np.flatnonzero(found >= length)):
        found[outside] = once(found[outside])
    return found.astype(np.int64)


def batch_indices(seed: int, step: int, batch_size: int, length: int) -> list[int]:
    """Items of one step, running through one epoch after another; a batch may straddle two."""
    places = np.arange(batch_size, dtype=np.int64) + step * batch_size
    epochs, offsets = np.divmod(places, length)
    return np.concatenate(
        [
            permuted(offsets[epochs == epoch], derive_seed(seed, "epoch", int(epoch)), length)
            for epoch in np.unique(epochs)
        ]
    ).tolist()


class StepBatches(Sampler[list[int]]):
    """:func:`batch_indices` of several steps, as a batch sampler for PyTorch's DataLoader."""

    def __init__(self, seed: int, batch_size: int, length: int, steps: range) -> None:
        self.seed, self.batch_size, self.length, self.steps = seed, batch_size, length, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield batch_indices(self.seed, step, self.batch_size, self.length)
