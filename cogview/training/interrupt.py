# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a training to end: it finishes its step and saves first."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 2.0  # within which a second signal ends the process


class Interrupted(KeyboardInterrupt):
    """A training that a signal ended, after it saved or because a second one came."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class DeferredInterrupt:
    """Within the block, a first Ctrl-C, SIGTERM or SIGHUP only sets ``requested``; a second one ends at once.

    Python handles signals between two of its own operations, and one of PyTorch's can take minutes. A thread
    therefore answers the first signal with "finishing this step". After the second one :class:`Interrupted`
    is raised; where that cannot happen within two seconds the thread ends the process, which harms nothing
    that is saved. A signal that was ignored before, as SIGHUP is under ``nohup``, stays ignored. The block
    does nothing outside the main thread, where Python delivers no signals.

    With several ``ranks`` a further signal means nothing: a terminal sends Ctrl-C to all of them, and then
    ``torchrun`` sends it once more. It ends those that have not saved after 30 seconds. ``tells`` is whether
    this rank answers.
    """

    def __init__(self, ranks: int = 1, tells: bool = True) -> None:
        self.requested = False
        self._ranks, self._tells = ranks, tells
        self._signum: int = signal.SIGINT
        self._is_main = threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._left = threading.Event()

    def exception(self) -> Interrupted:
        """What to raise once the step is finished and saved."""
        return Interrupted(self._signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and self._ranks == 1:
            raise Interrupted(signum)
        self.requested, self._signum = True, signum

    def _answer(self) -> None:
        """In a thread of its own: reads each signal's number, which Python writes the moment it comes."""
        times = 0
        while signum := os.read(self._reader, 1)[0]:
            if signum not in self._previous:
                continue
            times += 1
            if times == 1:
                further = "; a second Ctrl-C ends at once" if self._ranks == 1 else ""
                _say(f"\nfinishing this step, then saving{further}\n" if self._tells else "")
            elif self._ranks == 1 and not self._left.wait(GRACE_SECONDS):
                _say("\nended at once; what is saved is whole\n")
                os._exit(128 + signum)

    def __enter__(self) -> DeferredInterrupt:
        if self._is_main:
            handled = [signum for signum in SIGNALS if _is_handled_here(signum)]
            self._previous = {signum: signal.signal(signum, self._handle) for signum in handled}
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._answer, daemon=True)
            self._thread.start()
            _open_blocks.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        _open_blocks.remove(self)
        self._left.set()
        self._restore()
        os.write(self._writer, b"\0")
        self._thread.join()
        for descriptor in (self._reader, self._writer):
            os.close(descriptor)

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)


_open_blocks: list[DeferredInterrupt] = []


def _restore_in_child() -> None:
    """A process that reads data ahead dies of signals as any other; it does not answer in this one's name."""
    while _open_blocks:
        _open_blocks.pop()._restore()


os.register_at_fork(after_in_child=_restore_in_child)


def _is_handled_here(signum: int) -> bool:
    """Not if it is ignored, as by ``nohup``, or belongs to a handler that Python cannot put back."""
    return signal.getsignal(signum) not in (signal.SIG_IGN, None)


def _say(message: str) -> None:
    """Tell it on standard error, past Python's buffers, which another thread may hold.

    A closed terminal, which is what SIGHUP tells of, refuses every word. The training must be able to save
    all the same, so what it says from then on goes nowhere.
    """
    try:
        os.write(2, message.encode())
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        terminal = os.fstat(2)
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                kind = os.fstat(descriptor)
                if stat.S_ISCHR(kind.st_mode) and kind.st_rdev == terminal.st_rdev:
                    os.dup2(nowhere, descriptor)
        os.close(nowhere)
