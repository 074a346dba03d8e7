# SPDX-License-Identifier: Apache-2.0
"""From pictures with captions to a trained run: first both tokenizers, then the transformer.

All that can go wrong with the data or the sizes is found first; only then are settings written. They bind
the folder once a first checkpoint is there: a call that failed before it can be repeated with others.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cogview.config import Preset
from cogview.data.pairs import Pairs, open_pairs
from cogview.data.tokens import TokenDataset, encode_images, tokenize_captions
from cogview.device import default_device
from cogview.files import StrPath, read_json, save_tensors, write_json
from cogview.model.transformer import CogView
from cogview.presets import default_preset, implied_preset
from cogview.seeding import derive_seed
from cogview.settings import (
    MODEL_SETTINGS,
    TOKENIZER_SETTINGS,
    ModelSettings,
    TokenizerSettings,
    check_settings,
    write_settings,
)
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER, load_tokenizers
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training import distributed
from cogview.training.checkpoint import CHECKPOINTS, latest_checkpoint
from cogview.training.loop import History
from cogview.training.plan import plan_model, plan_text, require_fitting_preset
from cogview.training.precision import Precision
from cogview.training.transformer import train
from cogview.training.vqvae import ImageTokenizerTrainer, train_image_tokenizer

TOKENIZER_HISTORY = "image_tokenizer_history.json"


def _tell(notes: Sequence[str], progress: bool) -> None:
    for note in notes if progress else ():
        print(note, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class TrainTokenizers:
    """Train both tokenizers on ``data`` (a folder, or ``"digits"``) into the run folder ``out``."""

    data: StrPath
    out: StrPath
    preset: Preset | None = None  # None: digits for the digits, small for a folder
    device: str = field(default_factory=default_device)
    progress: bool = True
    workers: int = 0  # processes that read images ahead; 0 reads them between the steps


def train_tokenizers(options: TrainTokenizers) -> History:
    """Train text and image tokenizer, or finish what an interrupted call began.

    Returns the image tokenizer's history (``reconstruction`` and ``codes_used`` per step). A finished
    tokenizer is not trained again.

    Raises:
        ValueError: the folder was started with other settings; captions without text; images that cannot
            be read, all of them listed.
        FileNotFoundError: no such data, or listed files that are not there.
    """
    out = Path(options.out)
    preset = options.preset or default_preset(options.data)
    settings = TokenizerSettings(
        os.fspath(options.data),
        preset.text_pieces,
        preset.image_tokenizer,
        preset.image_tokenizer_train,
        preset.name,
    )
    is_finished = (out / IMAGE_TOKENIZER).exists()
    is_started = is_finished or latest_checkpoint(out / ImageTokenizerTrainer.checkpoints) is not None
    if is_started:
        check_settings(out / TOKENIZER_SETTINGS, settings)
    pairs = open_pairs(options.data)
    if not is_finished:
        pairs.check(preset.image_tokenizer.image_size, progress=options.progress)
    if not is_started:
        captions = [caption for index in range(len(pairs)) for caption in pairs.captions(index)]
        plan = plan_text(captions, preset.text_pieces)
        _tell(plan.notes, options.progress)
        write_settings(out / TOKENIZER_SETTINGS, settings)
        plan.tokenizer.save(out / TEXT_TOKENIZER)
    if not is_finished:
        _train_image_tokenizer(pairs, preset, options)
    return read_json(out / TOKENIZER_HISTORY)


def _train_image_tokenizer(pairs: Pairs, preset: Preset, options: TrainTokenizers) -> None:
    out = Path(options.out)
    torch.manual_seed(derive_seed(preset.image_tokenizer_train.seed, "init image tokenizer"))
    tokenizer = ImageTokenizer(preset.image_tokenizer).to(options.device)
    history = train_image_tokenizer(
        tokenizer,
        pairs,
        preset.image_tokenizer_train,
        out,
        progress=options.progress,
        workers=options.workers,
    )
    write_json(out / TOKENIZER_HISTORY, history)
    save_tensors(out / IMAGE_TOKENIZER, tokenizer.state_dict())


@dataclass(frozen=True)
class TrainModel:
    """Train the transformer on ``data`` into the run folder ``out``, which holds its tokenizers."""

    data: StrPath
    out: StrPath
    preset: Preset | None = None  # None: the one that fits the tokenizers of the folder
    device: str = field(default_factory=default_device)
    progress: bool = True


def train_model(options: TrainModel) -> History:
    """Train the transformer, or go on from its latest checkpoint; under ``torchrun``, all ranks together.

    Vocabulary, number of positions and room for text follow from the tokenizers and the captions (see
    :func:`cogview.training.plan.plan_model`). Returns the history: image loss, text loss and learning rate
    per step.

    Raises:
        ValueError: the preset is made for other pictures than the folder's tokenizers; the device cannot
            compute in the preset's precision; the folder was started with other settings; images that cannot
            be read, all of them listed.
        FileNotFoundError: no tokenizers in the folder, no such data, or listed files that are not there.
    """
    with distributed.joined_ranks(options.device):
        speaks = options.progress and distributed.is_first()
        return _train_model(dataclasses.replace(options, progress=speaks))


def _train_model(options: TrainModel) -> History:
    out = Path(options.out)
    preset = options.preset or implied_preset(out)
    require_fitting_preset(out, preset)
    Precision(preset.train.precision, options.device)  # Found out before the images are encoded.
    tokenizers = load_tokenizers(out, options.device)
    pairs = open_pairs(options.data)
    captions = tokenize_captions(pairs, tokenizers.text)
    plan = plan_model(preset, tokenizers.vocab, tokenizers.image.config.codes_per_image, captions)
    settings = ModelSettings(
        os.fspath(options.data), plan.config, preset.sampling, plan.max_text_tokens, preset.train
    )
    is_started = latest_checkpoint(out / CHECKPOINTS) is not None
    if is_started:
        check_settings(out / MODEL_SETTINGS, settings)
    _tell(plan.notes, options.progress)
    pairs.check(tokenizers.image.config.image_size, progress=options.progress)
    codes = encode_images(pairs, tokenizers.image, progress=options.progress)
    texts = captions.cut(plan.max_text_tokens).pieces
    dataset = TokenDataset(tokenizers.vocab, codes, texts, plan.row_length)
    torch.manual_seed(derive_seed(preset.train.seed, "init model"))
    model = CogView(plan.config).to(options.device)
    if not is_started and distributed.is_first():
        write_settings(out / MODEL_SETTINGS, settings)
    return train(model, dataset, preset.train, out, progress=options.progress)
