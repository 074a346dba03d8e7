# SPDX-License-Identifier: Apache-2.0
"""The functions behind the commands: each takes one dataclass, works on a run folder and returns data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview.data.image_files import read_image
from cogview.device import default_device
from cogview.evaluation.rerank import rerank
from cogview.generation.captions import caption_loss, generate_captions
from cogview.generation.text_to_image import generate_codes
from cogview.run import Run, load_run
from cogview.settings import load_model_settings
from cogview.tokens.sequence import fit_text


def run_sampling(folder: Path) -> SamplingConfig:
    """How a run samples unless told otherwise."""
    return load_model_settings(folder).sampling


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
        sampling=options.sampling or run.sampling,
        seed=options.seed,
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
