# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions, whatever they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from cogview.files import StrPath


class Pairs(Protocol):
    """Images and their captions."""

    def __len__(self) -> int: ...

    def image(self, index: int, size: int) -> Tensor:
        """``[3, size, size]`` in [0, 1]."""

    def captions(self, index: int) -> list[str]:
        """At least one caption."""

    def name(self, index: int) -> str:
        """What to call the image in a message."""

    def origin(self, index: int) -> str | None:
        """What the image is an altered copy of; None for a picture of its own."""

    def check(self, size: int, *, skip_bad: bool = False, progress: bool = True) -> list[str]:
        """Read every image at ``size`` once. ValueError that lists those which cannot be read.

        With ``skip_bad`` these are left out of the pairs instead; returns why, one line each.
        """

    def identity(self) -> Iterator[bytes]:
        """See :func:`cogview.data.fingerprint.fingerprint`."""


def open_pairs(data: StrPath, *, skip_bad: bool = False) -> Pairs:
    """``"digits"`` for the training part of the built-in digits, anything else is a folder.

    With ``skip_bad`` files that are not there are left out; :meth:`Pairs.check` tells which.
    """
    if os.fspath(data) == "digits":
        from cogview.data.digits import training_pairs

        return training_pairs()
    from cogview.data.folder import FolderPairs

    return FolderPairs(data, skip_bad=skip_bad)
