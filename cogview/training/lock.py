# SPDX-License-Identifier: Apache-2.0
"""One training in a run folder at a time."""

from __future__ import annotations

from cogview.folder_lock import FolderLock

LOCK = "training.lock"


class RunLock(FolderLock):
    """The lock of a training on its run folder."""

    name, busy = LOCK, "is being trained"
    elsewhere = "train in a folder of your own (a copy of this one goes on where it is)"
