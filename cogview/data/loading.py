# SPDX-License-Identifier: Apache-2.0
"""Batches of training steps, made in this process or ahead of it in others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cogview.data.pairs import Pairs

T = TypeVar("T")


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


class _ItemOrError(Dataset[T | Exception], Generic[T]):
    """What a function makes of each item, or its error, to whose words PyTorch would add a traceback."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make = make

    def __getitem__(self, item: Any) -> T | Exception:
        try:
            return self.make(item)
        except (ValueError, OSError) as error:
            return error


def _load(make: Callable[[Any], T], items: Sampler[Any] | Iterable[Any], workers: int) -> Iterator[T]:
    loader = DataLoader(
        _ItemOrError(make),
        sampler=items,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # The loader draws a seed from it rather than from the global one.
    )
    with torch.device("cpu"):  # It draws the seed by that generator on the default device.
        batches = iter(loader)
    for made in batches:
        if isinstance(made, Exception):
            raise made
        yield made


def _images(pairs: Pairs, size: int, indices: list[int]) -> Tensor:
    return torch.stack([pairs.image(index, size) for index in indices])


def training_images(
    pairs: Pairs, size: int, order: Sampler[list[int]] | Iterable[list[int]], workers: int = 0
) -> Iterator[Tensor]:
    """Batches ``[B, 3, size, size]`` of the items that ``order`` lists, with ``workers`` processes."""
    return _load(partial(_images, pairs, size), order, workers)


def training_batches(batch: Callable[[int], T], steps: range, workers: int = 0) -> Iterator[T]:
    """``batch(step)`` of each step in order; ``workers`` processes, if there are any, make them ahead."""
    return _load(batch, steps, workers)
