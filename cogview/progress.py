# SPDX-License-Identifier: Apache-2.0
"""How far long work has come: a moving bar in a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

LINE_SECONDS = 5.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class Progress:
    """Progress over ``total`` units of work, written to standard error; a context manager.

    Args:
        initial: units that an earlier, interrupted call has done.
        enabled: False shows nothing but the messages of :meth:`write`.
    """

    def __init__(
        self, total: int, label: str, *, unit: str = "step", initial: int = 0, enabled: bool = True
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.initial = self.done = min(initial, total)
        self.enabled = enabled
        self._bar: Any = None
        self._values = ""
        self._started = self._last_line = time.monotonic()
        self._line_done = -1

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._last_line = -float("inf")  # The first update shows at once that the work goes on.
        if self.enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, initial=self.initial, desc=self.label, unit=self.unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._shown():
            if self._bar is not None:
                self._bar.close()
            elif self.enabled and self._line_done != self.done > self.initial:
                self._print_line()

    def update(self, count: int = 1, values: str = "") -> None:
        """Count ``count`` more units as done; ``values`` is shown behind them, such as the loss."""
        self.done += count
        self._values = values
        with self._shown():
            self._show(count, values)

    def _show(self, count: int, values: str) -> None:
        if self._bar is not None:
            if values:
                self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(count)
        elif self.enabled and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def write(self, message: str) -> None:
        """A message on a line of its own."""
        with self._shown():
            if self._bar is not None:
                self._bar.write(message, file=sys.stderr)
            else:
                print(message, file=sys.stderr, flush=True)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """A closed terminal or a broken pipe ends what is shown, not the work."""
        try:
            yield
        except OSError:
            self.enabled, self._bar = False, None

    def _print_line(self) -> None:
        self._last_line, self._line_done = time.monotonic(), self.done
        line = f"{self.label}: {self.unit} {self.done} of {self.total}"
        elapsed, advanced = self._last_line - self._started, self.done - self.initial
        if advanced and elapsed > 0:
            line += f", {_duration(elapsed)} so far"
            left = self.total - self.done
            if left:
                line += f", {_duration(elapsed / advanced * left)} left"
        print(line + (f"; {self._values}" if self._values else ""), file=sys.stderr, flush=True)
