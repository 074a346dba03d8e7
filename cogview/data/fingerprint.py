# SPDX-License-Identifier: Apache-2.0
"""What tells one set of training data from another: what a training sees of them, not where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

MANY_FILES = 1024  # of which contents are read; of more, that many, evenly chosen
BLOCK, MANY_BLOCKS = 1 << 16, 4  # of one file, alike


class Identified(Protocol):
    """Data that can say what they are: pictures with captions, or rows of tokens."""

    def identity(self) -> Iterator[bytes]:
        """Parts of a description that changes with whatever a training would see of the data."""


def fingerprint(data: Identified) -> str:
    """A digest of ``data``, 32 hexadecimal digits.

    Of a folder: names, sizes and captions of its pictures, and what :func:`contents` reads of them; of shards
    the same; of rows: their content; of the built-in digits: how they were made, of the emoji: names, sizes
    and captions. No path and no time of change is part of it, so data that were moved keep theirs.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in data.identity():
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def contents(paths: Sequence[Path]) -> Iterator[bytes]:
    """Digests of files, at most 1,024 of them and 256 KB of each, evenly chosen.

    Sizes do not tell pictures apart that were not compressed, nor shards, which are padded. To read all would
    take hours of a large set, each time that a training goes on.
    """
    for index in _even(len(paths), MANY_FILES):
        digest = hashlib.blake2b(digest_size=16)
        with paths[index].open("rb") as file:
            size = paths[index].stat().st_size
            for block in _even(-(-size // BLOCK), MANY_BLOCKS):
                file.seek(block * BLOCK)
                digest.update(file.read(BLOCK))
        yield digest.digest()


def _even(count: int, most: int) -> Sequence[int]:
    """Places in a list of ``count``, the first and the last among them: all, or ``most``."""
    return range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]
