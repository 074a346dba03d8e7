# SPDX-License-Identifier: Apache-2.0
"""One training in a run folder at a time."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from cogview.files import StrPath, exists, lock, require_folder

LOCK = "training.lock"
_held: list[IO[str]] = []


class RunLock:
    """Within the block, no other training can take the same run folder; the system frees it however it ends.

    A folder that is not there yet is taken by :meth:`take`, which makes it, so that a training whose data are
    not right leaves nothing behind.

    Raises:
        BlockingIOError: another training holds the folder; it says which.
        OSError, ValueError: the folder cannot be written to, or not be made.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the folder, if it is not held yet."""
        if self._file is not None:
            return
        self._file = file = self._open()
        try:
            lock(file, self.folder)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            self._release()
            raise BlockingIOError(
                f"{self.folder} is being trained by {holder}; wait until it ends, or choose another folder"
            ) from None
        _held.append(file)
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"process {os.getpid()} on {socket.gethostname()} since {started}", file=file, flush=True)

    def _open(self) -> IO[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(self.folder / LOCK, "a+", encoding="utf-8")
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be written to: {error.strerror}; train in a folder of your own "
                "(a copy of this one goes on where it is)"
            ) from None

    def _release(self) -> None:
        if self._file is not None:
            if self._file in _held:
                _held.remove(self._file)
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLock:
        if exists(self.folder):
            self.take()
        else:
            require_folder(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()


def _forget_in_child() -> None:
    """A process that reads data ahead must not hold the folder longer than the training that began it."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
