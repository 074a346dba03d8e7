# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, as a training uses it: what cannot be shown there does not end the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class Board:
    """Scalars and pictures of a training in ``folder``, from ``first_step`` on; a context manager.

    Without the package ``tensorboard``, or from the first time that the folder cannot be written to, it
    shows nothing, which it says once through ``tell``.
    """

    def __init__(self, folder: Path, first_step: int, tell: Callable[[str], object]) -> None:
        self._folder, self._tell = folder, tell
        self._writer: Any = None
        self._try(lambda: self._open(first_step))

    def _open(self, first_step: int) -> None:
        # TensorBoard takes a second to load, which only a training should pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=first_step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        if self._writer is not None:
            self._try(lambda: self._writer.add_scalar(name, value, step))

    def picture(self, name: str, picture: Any, step: int) -> None:
        """A PIL picture."""
        if self._writer is not None:
            pixels = np.asarray(picture.convert("RGB"))
            self._try(lambda: self._writer.add_image(name, pixels, step, dataformats="HWC"))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ImportError:
            self._tell(
                "the package tensorboard is not installed, so no curves are drawn: pip install tensorboard"
            )
        except OSError as error:
            self._writer = None
            self._tell(f"no more curves: {self._folder} cannot be written to: {error}")

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
