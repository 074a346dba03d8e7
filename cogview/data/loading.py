# SPDX-License-Identifier: Apache-2.0
"""Images of pairs in batches, read in this process or ahead of it in others."""

from __future__ import annotations

import signal
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cogview.data.pairs import Pairs


class PairImages(Dataset[Tensor]):
    """The images of ``pairs`` at one size."""

    def __init__(self, pairs: Pairs, size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        return self.pairs.image(index, self.size)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C and SIGHUP reach every process of a terminal, a scheduler's SIGTERM every process of a job. The
    # training process finishes its step, saves, and then ends its workers.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def training_images(
    pairs: Pairs, size: int, order: Sampler[list[int]] | Iterable[list[int]], workers: int = 0
) -> DataLoader[Tensor]:
    """Batches ``[B, 3, size, size]`` of the items that ``order`` lists, with ``workers`` processes."""
    return DataLoader(
        PairImages(pairs, size),
        batch_sampler=order,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # The loader draws a seed from it rather than from the global one.
    )
