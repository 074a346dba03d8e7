# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions one after another, from any source, and reading them ahead of their use."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from cogview.data.pairs import Pairs

AHEAD = 2  # chunks that are read while another one is encoded


@dataclass(frozen=True)
class Sample:
    """One picture, not read yet."""

    name: str
    captions: Sequence[str]
    read: Callable[[int], Tensor]  # size to [3, size, size]; ValueError or OSError if that is impossible
    origin: str | None = None  # what the picture is an altered copy of


class Samples(Protocol):
    """A source of samples in parts; a part is read from its beginning."""

    @property
    def parts(self) -> Sequence[str]:
        """Their names."""

    @property
    def num_images(self) -> int | None:
        """In all, where it is known."""

    @property
    def left_out(self) -> Sequence[str]:
        """What is known to be missing."""

    def part(self, number: int, first: int) -> Iterator[Sample]:
        """The samples of a part from the one with number ``first`` on."""

    def identity(self) -> Iterator[bytes]:
        """See :func:`cogview.data.fingerprint.fingerprint`."""


class PairSamples:
    """All of ``pairs``, in one part."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.parts = ("",)
        self.num_images = len(pairs)
        self.left_out = pairs.absent

    def part(self, number: int, first: int) -> Iterator[Sample]:
        pairs = self.pairs
        for index in range(first, len(pairs)):
            read = partial(pairs.image, index)
            yield Sample(pairs.name(index), pairs.captions(index), read, pairs.origin(index))

    def identity(self) -> Iterator[bytes]:
        return self.pairs.identity()


def _read(sample: Sample, size: int) -> Tensor | str:
    try:
        return sample.read(size)
    except (ValueError, OSError) as error:
        return str(error)


def read_ahead(
    samples: Iterable[Sample], size: int, chunk: int, workers: int
) -> Iterator[list[tuple[Sample, Tensor | str]]]:
    """Samples in order, ``chunk`` at a time, each with its picture or with what is wrong with it.

    ``workers`` threads read pictures: Pillow's decoders run beside Python, and neither the order of the
    samples nor the way a source is read depends on their number.
    """
    remaining = iter(samples)
    ahead: deque[tuple[list[Sample], list[Future[Tensor | str]]]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(ahead) <= AHEAD and (part := list(itertools.islice(remaining, chunk))):
                ahead.append((part, [threads.submit(_read, sample, size) for sample in part]))
            if not ahead:
                return
            part, pictures = ahead.popleft()
            yield [(sample, picture.result()) for sample, picture in zip(part, pictures, strict=True)]
    finally:
        threads.shutdown(cancel_futures=True)
