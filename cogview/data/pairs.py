# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions, whatever they come from."""

from __future__ import annotations

import os
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

    def check(self, size: int, *, progress: bool = True) -> None:
        """ValueError that lists every image which cannot be read at ``size``."""


def open_pairs(data: StrPath) -> Pairs:
    """``"digits"`` for the training part of the built-in digits, anything else is a folder."""
    if os.fspath(data) == "digits":
        from cogview.data.digits import training_pairs

        return training_pairs()
    from cogview.data.folder import FolderPairs

    return FolderPairs(data)
