# SPDX-License-Identifier: Apache-2.0
"""Pictures with captions, whatever they come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from cogview.files import StrPath


class Pairs(Protocol):
    """Images and their captions."""

    @property
    def absent(self) -> Sequence[str]:
        """Names of images that are listed and not there."""

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


def is_shards(data: StrPath) -> bool:
    """Whether ``data`` names WebDataset shards rather than a folder."""
    name = os.fspath(data)
    is_archive = name.endswith((".tar", ".tar.gz", ".tgz")) and not os.path.isdir(name)
    return name.startswith("pipe:") or "://" in name or is_archive


def open_pairs(data: StrPath, *, skip_bad: bool = False) -> Pairs:
    """``"digits"`` or ``"emoji"`` for the training part of the built-in data, anything else is a folder.

    With ``skip_bad`` files that are not there are left out; :meth:`Pairs.check` tells which.
    """
    if is_shards(data):
        raise ValueError(
            f"{os.fspath(data)} names shards, which cogview tokenize turns into rows to train on; "
            "tokenizers are trained on a folder of pictures"
        )
    if os.fspath(data) == "digits":
        from cogview.data.digits import training_pairs

        return training_pairs()
    if os.fspath(data) == "emoji":
        from cogview.data import emoji

        return emoji.training_pairs()
    from cogview.data.folder import FolderPairs

    return FolderPairs(data, skip_bad=skip_bad)


def open_pictures(data: StrPath) -> Pairs:
    """As :func:`open_pairs`, for a training that reads no captions: a folder needs none."""
    if os.fspath(data) in ("digits", "emoji") or is_shards(data):
        return open_pairs(data)
    from cogview.data.folder import pictures_with

    return pictures_with("a picture", data)
