# SPDX-License-Identifier: Apache-2.0
"""Batches of training steps, made in this process or ahead of it in others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cogview.data.pairs import Pairs

T = TypeVar("T")


class PairImages(Dataset[Tensor]):
    """The images of ``pairs`` at one size."""

    def __init__(self, pairs: Pairs, size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        return self.pairs.image(index, self.size)


def _leave_group(worker: int) -> None:
    """What asks a training to end, Ctrl-C above all, reaches its whole group, but must not reach its workers.

    The training then finishes its step, for which it needs them. It ends them itself: where an error left
    them waiting, by SIGTERM, which they must therefore not ignore, or the process would never end.
    """
    os.setpgrp()
    signal.set_wakeup_fd(-1)  # A signal here would be told to the training as one of its own.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_images(
    pairs: Pairs, size: int, order: Sampler[list[int]] | Iterable[list[int]], workers: int = 0
) -> DataLoader[Tensor]:
    """Batches ``[B, 3, size, size]`` of the items that ``order`` lists, with ``workers`` processes."""
    return DataLoader(
        PairImages(pairs, size),
        batch_sampler=order,
        num_workers=workers,
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # The loader draws a seed from it rather than from the global one.
    )


class _Steps(Dataset[T], Generic[T]):
    """What a pure function gives for each step."""

    def __init__(self, batch: Callable[[int], T]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> T:
        return self.batch(step)


def training_batches(batch: Callable[[int], T], steps: range, workers: int = 0) -> Iterator[T]:
    """``batch(step)`` of each step in order; ``workers`` processes, if there are any, make them ahead."""
    return iter(
        DataLoader(
            _Steps(batch),
            sampler=steps,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_leave_group,
            generator=torch.Generator(),
        )
    )
