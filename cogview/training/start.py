# SPDX-License-Identifier: Apache-2.0
"""The run that a finetuning begins with: its weights, its tokenizers, and what its model must remain."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cogview.files import StrPath, exists, write_bytes
from cogview.model.transformer import CogView
from cogview.settings import TOKENIZER_SETTINGS, ModelSettings, load_model_settings, train_model_hint
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER, fingerprint_tokenizers
from cogview.training.checkpoint import (
    CHECKPOINTS,
    check_origin,
    fingerprint_weights,
    load_model,
    require_checkpoint,
)

# Options of a model that are no shape of its weights, so that a finetuning may choose them.
_FREE = ("dropout", "three_region", "activation_checkpointing")


class Start:
    """The latest weights of the run in ``folder``, also of one that was converted and has no optimizer.

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint yet.
        ValueError: its weights do not belong to its tokenizers, whose fingerprint is ``tokenizers``.
    """

    def __init__(self, folder: StrPath, tokenizers: str) -> None:
        self.folder = Path(folder)
        self.run = load_model_settings(folder)
        self.checkpoint = require_checkpoint(self.folder / CHECKPOINTS, train_model_hint(folder))
        check_origin(self.checkpoint, {"tokenizers": tokenizers})
        self.fingerprint = fingerprint_weights(self.checkpoint)

    def settings(self, wanted: ModelSettings) -> ModelSettings:
        """``wanted`` with what the run has learned of captions. ValueError for a model of another shape."""
        for field in dataclasses.fields(wanted.model):
            now, then = getattr(wanted.model, field.name), getattr(self.run.model, field.name)
            if field.name not in _FREE and now != then:
                raise ValueError(
                    f"{field.name} must be that of the weights in {self.folder}, {then}, got {now}"
                )
        # Rows in image-to-text order teach the end of a caption, which released weights do not know.
        if wanted.train.caption_fraction > 0:
            return wanted
        return dataclasses.replace(wanted, caption_tokens=self.run.caption_tokens)

    def copy_tokenizers(self, out: Path) -> None:
        """The tokenizers into the new run. ValueError if it has others already."""
        names = (TEXT_TOKENIZER, IMAGE_TOKENIZER, TOKENIZER_SETTINGS)
        if all(exists(out / name) for name in names):
            if fingerprint_tokenizers(out) != fingerprint_tokenizers(self.folder):
                raise ValueError(f"{out} has other tokenizers than {self.folder}; choose another folder")
            return
        for name in names:
            write_bytes(out / name, (self.folder / name).read_bytes())

    def load_weights(self, model: CogView) -> None:
        """Copy the weights into ``model``, whatever their dtype."""
        load_model(self.checkpoint, model)
