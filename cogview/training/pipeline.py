# SPDX-License-Identifier: Apache-2.0
"""From pictures with captions to a trained run: first both tokenizers, then the transformer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cogview.config import Preset
from cogview.data.pairs import open_pairs
from cogview.data.tokens import TokenDataset, encode_images, tokenize_captions
from cogview.device import default_device
from cogview.files import read_json, save_tensors, write_json
from cogview.model.transformer import CogView
from cogview.seeding import derive_seed
from cogview.settings import (
    MODEL_SETTINGS,
    TOKENIZER_SETTINGS,
    ModelSettings,
    TokenizerSettings,
    claim_settings,
)
from cogview.tokens.sequence import FRAME_TOKENS
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.tokenizers import IMAGE_TOKENIZER, TEXT_TOKENIZER, load_tokenizers
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.transformer import train
from cogview.training.vqvae import train_image_tokenizer

TOKENIZER_HISTORY = "image_tokenizer_history.json"


@dataclass(frozen=True)
class TrainTokenizers:
    """Train both tokenizers on ``data`` (a folder, or ``"digits"``) into the run folder ``out``."""

    data: str
    out: Path
    preset: Preset
    device: str = field(default_factory=default_device)
    progress: bool = True


def train_tokenizers(options: TrainTokenizers) -> dict[str, list[float]]:
    """Train text and image tokenizer, or finish what an interrupted call began.

    Returns the image tokenizer's history (``reconstruction`` and ``codes_used`` per step). A finished
    tokenizer is not trained again.
    """
    preset, out = options.preset, options.out
    pairs = open_pairs(options.data)
    settings = TokenizerSettings(
        options.data, preset.text_pieces, preset.image_tokenizer, preset.image_tokenizer_train
    )
    claim_settings(out / TOKENIZER_SETTINGS, settings)
    if not (out / TEXT_TOKENIZER).exists():
        captions = [caption for index in range(len(pairs)) for caption in pairs.captions(index)]
        TextTokenizer.train(captions, preset.text_pieces).save(out / TEXT_TOKENIZER)
    if not (out / IMAGE_TOKENIZER).exists():
        torch.manual_seed(derive_seed(preset.image_tokenizer_train.seed, "init image tokenizer"))
        tokenizer = ImageTokenizer(preset.image_tokenizer).to(options.device)
        history = train_image_tokenizer(
            tokenizer, pairs, preset.image_tokenizer_train, out, progress=options.progress
        )
        write_json(out / TOKENIZER_HISTORY, history)
        save_tensors(out / IMAGE_TOKENIZER, tokenizer.state_dict())
    return read_json(out / TOKENIZER_HISTORY)


@dataclass(frozen=True)
class TrainModel:
    """Train the transformer on ``data`` into the run folder ``out``, which holds its tokenizers."""

    data: str
    out: Path
    preset: Preset
    device: str = field(default_factory=default_device)
    progress: bool = True


def train_model(options: TrainModel) -> dict[str, list[float]]:
    """Train the transformer, or go on from its latest checkpoint.

    Vocabulary and number of positions follow from the tokenizers and from the preset's
    ``max_text_tokens``. Returns the history: image loss, text loss and learning rate per step.
    """
    preset, out = options.preset, options.out
    tokenizers = load_tokenizers(out, options.device)
    pairs = open_pairs(options.data)
    num_codes = tokenizers.image.config.codes_per_image
    length = FRAME_TOKENS + preset.max_text_tokens + num_codes
    config = dataclasses.replace(preset.model, vocab_size=tokenizers.vocab.padded_size, max_positions=length)
    settings = ModelSettings(options.data, config, preset.sampling, preset.max_text_tokens, preset.train)
    claim_settings(out / MODEL_SETTINGS, settings)
    captions, cut = tokenize_captions(pairs, tokenizers.text, preset.max_text_tokens)
    if cut and options.progress:
        print(f"{cut} captions are longer than {preset.max_text_tokens} tokens and lose their end")
    codes = encode_images(pairs, tokenizers.image, progress=options.progress)
    dataset = TokenDataset(tokenizers.vocab, codes, captions, length)
    torch.manual_seed(derive_seed(preset.train.seed, "init model"))
    model = CogView(config).to(options.device)
    return train(model, dataset, preset.train, out, progress=options.progress)
