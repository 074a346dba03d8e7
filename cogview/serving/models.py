# SPDX-License-Identifier: Apache-2.0
"""The runs behind a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cogview.evaluation.cap_loss import caption_loss
from cogview.files import StrPath, exists
from cogview.model.precision import Precision
from cogview.run import PRETRAINED, Run, load_run
from cogview.settings import MODEL_SETTINGS


@dataclass(frozen=True)
class Models:
    """A run that draws and reads, and one that enlarges, where there is one."""

    run: Run
    folder: Path
    enlarger: Run | None = None

    @property
    def name(self) -> str:
        """What the page calls the run."""
        return "emoji" if self.folder == PRETRAINED else self.folder.resolve().name

    def require_present(self) -> None:
        """FileNotFoundError if the run's folder has gone: whoever removed it wants it used no longer."""
        if not exists(self.folder / MODEL_SETTINGS):
            raise FileNotFoundError(
                f"the run {self.name} is no longer there; put it back, or start cogview serve with "
                "another --run"
            )

    def cap_loss(self, pixels: Tensor, pieces: Sequence[int]) -> float:
        """As :meth:`Run.cap_loss`, which warns on standard error where the page tells the visitor."""
        codes = self.run.encode([pixels])
        return float(caption_loss(self.run.model, self.run.tokenizers.vocab, codes, [pieces])[0])

    def unknown(self, text: str) -> str:
        """A line about the parts of a text that the run never learned; empty where there are none."""
        parts = self.run.tokenizers.text.unknown_pieces(text)
        return f"the model never learned these parts: {' '.join(parts)}" if parts else ""


def load_models(
    folder: StrPath | None, enlarger: StrPath | None, device: str | None, precision: Precision
) -> Models:
    """The runs of folders; None is the run that ships. A run that learned to enlarge does so by itself.

    Raises what :func:`cogview.load_run` raises, and ValueError for an enlarger that never learned it.
    """
    folder = PRETRAINED if folder is None else Path(folder)
    run = load_run(folder, device, precision)
    if enlarger is None:
        return Models(run, folder, run if _enlarges(run) else None)
    other = load_run(enlarger, device, precision)
    if not _enlarges(other):
        raise ValueError(
            f"--enlarger must be a run of cogview finetune super-resolution or local-super-resolution, "
            f"got {enlarger}"
        )
    if other.tokenizers.fingerprint != run.tokenizers.fingerprint:
        raise ValueError(
            f"--enlarger must have the tokenizers of {folder}, got {enlarger}, which has others; finetune "
            f"one that begins with {folder}"
        )
    return Models(run, folder, other)


def _enlarges(run: Run) -> bool:
    return (run.finetuned_for or "").endswith("super-resolution")
