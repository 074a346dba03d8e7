# SPDX-License-Identifier: Apache-2.0
"""One process at work in a folder at a time."""

from __future__ import annotations

import os
import socket
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from cogview.files import StrPath, exists, lock, require_folder

if TYPE_CHECKING:
    from typing_extensions import Self

_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


class FolderLock:
    """Within the block, no other process can take the same folder; the system frees it however it ends.

    A folder that is not there yet is taken by :meth:`take`, which makes it, so that work whose data are not
    right leaves nothing behind.

    Raises:
        BlockingIOError: another process holds the folder; it says which.
        OSError, ValueError: the folder cannot be written to, or not be made.
    """

    name: str  # of the file that is held in the folder
    busy: str  # what the other process does, as in "is being trained"
    elsewhere: str  # what to do where the folder cannot be written to

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
            self.release()
            raise BlockingIOError(
                f"{self.folder} {self.busy} by {holder}; wait until it ends, or choose another folder"
            ) from None
        _held.add(file)
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"process {os.getpid()} on {socket.gethostname()} since {started}", file=file, flush=True)

    def _open(self) -> IO[str]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return open(self.folder / self.name, "a+", encoding="utf-8")
        except OSError as error:
            raise OSError(f"{self.folder} cannot be written to: {error.strerror}; {self.elsewhere}") from None

    def release(self) -> None:
        """Hold the folder no longer."""
        if self._file is not None:
            _held.discard(self._file)
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        if exists(self.folder):
            self.take()
        else:
            require_folder(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _forget_in_child() -> None:
    """A process that reads data ahead must not hold the folder longer than the process that began it."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
