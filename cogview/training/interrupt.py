# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that waits for a safe moment."""

from __future__ import annotations

import signal
import threading
from types import TracebackType


class DeferredInterrupt:
    """Within the block, the first Ctrl-C only sets ``requested``; a second one interrupts at once.

    So a training loop can finish its step and save. Does nothing outside the main thread, where Python
    delivers no signals.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_main = threading.current_thread() is threading.main_thread()

    def _handle(self, signum: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> DeferredInterrupt:
        if self._is_main:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._previous)
