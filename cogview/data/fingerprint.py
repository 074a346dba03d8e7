# SPDX-License-Identifier: Apache-2.0
"""What tells one set of training data from another: what a training sees of them, not where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol


class Identified(Protocol):
    """Data that can say what they are: pictures with captions, or rows of tokens."""

    def identity(self) -> Iterator[bytes]:
        """Parts of a description that changes with whatever a training would see of the data."""


def fingerprint(data: Identified) -> str:
    """A digest of ``data``, 32 hexadecimal digits.

    Of a folder: names, sizes and captions of its pictures; of rows: their content; of the built-in digits:
    how they were made. No path and no time of change is part of it, so data that were moved keep theirs.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in data.identity():
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
