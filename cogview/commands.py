# SPDX-License-Identifier: Apache-2.0
"""The functions behind the commands: each takes one dataclass, works on a run folder and returns data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cogview.config import Preset, SamplingConfig
from cogview.data.pairs import TokenDataset, encode_images, open_pairs, read_image, tokenize_captions
from cogview.evaluation.cap_loss import caption_loss
from cogview.evaluation.rerank import rerank
from cogview.generation.captions import generate_captions
from cogview.generation.engine import DrawOptions
from cogview.generation.text_to_image import generate_codes
from cogview.model.transformer import CogView
from cogview.run import (
    IMAGE_TOKENIZER,
    MODEL_SETTINGS,
    TEXT_TOKENIZER,
    TOKENIZER_SETTINGS,
    Run,
    claim_settings,
    load_run,
    load_settings,
    load_tokenizers,
)
from cogview.seeding import derive_seed
from cogview.tokens.sequence import FRAME_TOKENS, fit_text
from cogview.tokens.text_tokenizer import TextTokenizer
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.checkpoint import read_json, save_tensors, write_json
from cogview.training.transformer import train
from cogview.training.vqvae import train_image_tokenizer

TOKENIZER_HISTORY = "image_tokenizer_history.json"


def default_device() -> str:
    """``"cuda"`` where an NVIDIA GPU answers, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    pairs = open_pairs(options.data, digit_copies=preset.digit_copies)
    settings = {
        "data": options.data,
        "text_pieces": preset.text_pieces,
        "image_tokenizer": preset.image_tokenizer,
        "image_tokenizer_train": preset.image_tokenizer_train,
    }
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
    pairs = open_pairs(options.data, digit_copies=preset.digit_copies)
    num_codes = tokenizers.image.config.codes_per_image
    length = FRAME_TOKENS + preset.max_text_tokens + num_codes
    config = dataclasses.replace(preset.model, vocab_size=tokenizers.vocab.padded_size, max_positions=length)
    settings = {
        "data": options.data,
        "model": config,
        "train": preset.train,
        "sampling": preset.sampling,
        "max_text_tokens": preset.max_text_tokens,
    }
    claim_settings(out / MODEL_SETTINGS, settings)
    captions, cut = tokenize_captions(pairs, tokenizers.text, preset.max_text_tokens)
    if cut and options.progress:
        print(f"{cut} captions are longer than {preset.max_text_tokens} tokens and lose their end")
    codes = encode_images(pairs, tokenizers.image, progress=options.progress)
    dataset = TokenDataset(tokenizers.vocab, codes, captions, length)
    torch.manual_seed(derive_seed(preset.train.seed, "init model"))
    model = CogView(config).to(options.device)
    return train(model, dataset, preset.train, out, progress=options.progress)


def run_sampling(folder: Path) -> SamplingConfig:
    """How a run samples unless told otherwise."""
    return load_settings(folder)[1]


def encode_text(run: Run, text: str) -> list[int]:
    """Piece ids of a prompt; ValueError if it is empty or too long for the run's model."""
    pieces = run.tokenizers.text.encode(text)
    if not pieces:
        raise ValueError("the text is empty")
    return fit_text(pieces, run.max_text_tokens)


def encode_files(run: Run, paths: list[Path]) -> Tensor:
    """Codes ``[len(paths), num_codes]`` of image files."""
    tokenizer = run.tokenizers.image
    images = torch.stack([read_image(path, tokenizer.config.image_size) for path in paths])
    return tokenizer.encode(images.to(tokenizer.mean.device)).flatten(1)


def decode_codes(run: Run, codes: Tensor) -> Tensor:
    """Codes ``[..., num_codes]`` to images ``[..., 3, S, S]`` in [0, 1]."""
    grid = run.tokenizers.image.config.grid
    images = run.tokenizers.image.decode(codes.reshape(-1, grid, grid))
    return images.view(*codes.shape[:-1], *images.shape[1:])


@dataclass(frozen=True)
class Generate:
    """Draw ``num`` images for each text with the model of the folder ``run``."""

    run: Path
    texts: list[str]
    num: int = 16
    seed: int = 0
    sampling: SamplingConfig | None = None  # None: as the run was set up
    is_ranked: bool = True
    device: str = field(default_factory=default_device)


@dataclass(frozen=True)
class Generated:
    """Images ``[texts, num, 3, S, S]`` in [0, 1] and their CapLoss ``[texts, num]``, best first if ranked."""

    images: Tensor
    losses: Tensor
    unknown: list[list[str]]  # per text, parts that the text tokenizer does not know


def generate(options: Generate) -> Generated:
    """Images for each text, ordered by CapLoss if ``is_ranked``."""
    run = load_run(options.run, options.device)
    texts = [encode_text(run, text) for text in options.texts]
    codes = generate_codes(
        run.model,
        run.tokenizers.vocab,
        texts,
        run.tokenizers.image.config.codes_per_image,
        num_candidates=options.num,
        options=DrawOptions(options.sampling or run.sampling, options.seed),
    )
    order, losses = rerank(run.model, run.tokenizers.vocab, texts, codes)
    if options.is_ranked:
        losses = losses.gather(1, order)
        codes = codes.gather(1, order[..., None].expand_as(codes))
    unknown = [run.tokenizers.text.unknown_pieces(text) for text in options.texts]
    return Generated(decode_codes(run, codes), losses, unknown)


@dataclass(frozen=True)
class Caption:
    """Describe image files with the model of the folder ``run``."""

    run: Path
    images: list[Path]
    device: str = field(default_factory=default_device)


def caption(options: Caption) -> list[tuple[str, float]]:
    """Per image its most likely text, built greedily, and that text's CapLoss (NaN for an empty one)."""
    run = load_run(options.run, options.device)
    codes = encode_files(run, options.images)
    pieces = generate_captions(run.model, run.tokenizers.vocab, codes, max_text_tokens=run.max_text_tokens)
    results = []
    for row, text in zip(codes, pieces, strict=True):
        loss = (
            caption_loss(run.model, run.tokenizers.vocab, row[None], [text]).item() if text else float("nan")
        )
        results.append((run.tokenizers.text.decode(text), loss))
    return results


@dataclass(frozen=True)
class Rerank:
    """Order image files by how well ``text`` describes them."""

    run: Path
    text: str
    images: list[Path]
    device: str = field(default_factory=default_device)


def rerank_files(options: Rerank) -> list[tuple[Path, float]]:
    """The files and their CapLoss, best first."""
    run = load_run(options.run, options.device)
    codes = encode_files(run, options.images)
    order, losses = rerank(run.model, run.tokenizers.vocab, [encode_text(run, options.text)], codes[None])
    return [(options.images[index], losses[0, index].item()) for index in order[0].tolist()]
