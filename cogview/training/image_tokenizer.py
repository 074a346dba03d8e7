# SPDX-License-Identifier: Apache-2.0
"""A new image tokenizer and its training, whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cogview.config import ImageTokenizerConfig, ImageTokenizerTrainConfig
from cogview.data.pairs import Pairs
from cogview.files import StrPath, read_json
from cogview.tokens.tokenizers import IMAGE_TOKENIZER
from cogview.tokens.vqgan import VQGAN, make_image_tokenizer
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.loop import History, run_loop
from cogview.training.vqgan import VQGANTrainer
from cogview.training.vqvae import ImageTokenizerTrainer


def new_image_tokenizer(shape: ImageTokenizerConfig, config: ImageTokenizerTrainConfig) -> ImageTokenizer:
    """A tokenizer that is ready to be trained; it follows from PyTorch's global generator."""
    tokenizer = make_image_tokenizer(shape)
    if shape.patches:
        tokenizer.begin_with_patches(config.color_weight)
    return tokenizer


def train_image_tokenizer(
    tokenizer: ImageTokenizer,
    pairs: Pairs,
    config: ImageTokenizerTrainConfig,
    out: StrPath,
    *,
    origin: Mapping[str, str] = MappingProxyType({}),
    progress: bool = True,
    workers: int = 0,
) -> History:
    """Train ``tokenizer`` in place on the images of ``pairs``, resuming from ``out/tokenizer-checkpoints``.

    Loss of a VQ-VAE: pixel MSE (in [0, 1]) plus ``commitment`` times the commitment term,
    ``color_weight`` times the MSE of the cells' mean colours under ``stretched_hues`` and, where
    ``codebook`` is "straight-through", the codebook's own; that of a VQGAN is in
    :mod:`cogview.training.vqgan`. Adam, cosine to zero, networks under autocast in ``precision``. One
    whose loss or gradient is not finite does not change in that step. ``workers`` processes read images
    ahead; 0 reads them between the steps. Checkpoints keep ``origin``, fingerprints of what is trained
    on. Seeds PyTorch's global generators. Returns the history, per step what the trainer has in
    ``recorded``: ``reconstruction`` (MSE) and ``codes_used`` (distinct codes in the batch), and of a
    VQGAN four more. The rest is :func:`cogview.training.loop.run_loop`.
    """
    if isinstance(tokenizer, VQGAN):
        trainer: ImageTokenizerTrainer = VQGANTrainer(tokenizer, pairs, config, workers)
    else:
        trainer = ImageTokenizerTrainer(tokenizer, pairs, config, workers)
    trainer.origin = origin
    return run_loop(trainer, config, out, progress=progress)


def read_history(path: Path) -> History:
    """The history that was written beside a finished tokenizer.

    FileNotFoundError if absent, ValueError if damaged.
    """
    history = read_json(path)
    for name in ImageTokenizerTrainer.recorded:
        values = history.get(name) if isinstance(history, dict) else None
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            raise ValueError(
                f"{path} is damaged: it holds no history of {name}; remove it and "
                f"{path.parent / IMAGE_TOKENIZER}, and the same command writes both anew from the last "
                "checkpoint"
            )
    return history
