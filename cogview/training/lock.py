# SPDX-License-Identifier: Apache-2.0
"""One training in a run folder at a time."""

from __future__ import annotations

import os

from cogview.files import StrPath
from cogview.folder_lock import FolderLock

LOCK = "training.lock"


class RunLock(FolderLock):
    """The lock of a training on its run folder. ValueError for a folder from which weights cannot be read."""

    name, busy = LOCK, "is being trained"
    elsewhere = "train in a folder of your own (a copy of this one goes on where it is)"

    def __init__(self, folder: StrPath) -> None:
        try:
            os.fspath(folder).encode()
        except UnicodeEncodeError:  # safetensors writes such files and then reads none of them
            raise ValueError(f"--out must have a name in UTF-8, got {folder}; choose another") from None
        super().__init__(folder)
