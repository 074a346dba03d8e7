# SPDX-License-Identifier: Apache-2.0
"""A study of the paper's claim on image tokenizers (arXiv:2105.13290, section 2.2 and figure 2).

CogView reports that four ways to train a VQ-VAE converge to a similar level of loss, even with a codebook
that stays fixed after its initialisation. This trains all four on the data ``emoji`` with equal budgets.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from cogview.config import (
    STUDY_SEEDS,
    CodebookMethod,
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    require_seeds,
)
from cogview.data.emoji import EmojiPairs, held_out_combinations, training_pairs
from cogview.device import default_device
from cogview.evaluation.emoji_judge import EmojiJudge
from cogview.evaluation.studied_tokenizer import finish_tokenizer
from cogview.evaluation.study_plots import save_tokenizer_plot
from cogview.files import StrPath, write_csv, write_json
from cogview.images import picture_grid, save_overview, to_picture
from cogview.presets import PRESETS
from cogview.seeding import derive_seed
from cogview.settings import claim_settings
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.image_tokenizer import new_image_tokenizer
from cogview.training.loop import History

METHODS: tuple[CodebookMethod, ...] = typing.get_args(CodebookMethod)
SIMILAR = 0.1  # The worst method is at most so much above the best one where all are "at a similar level".
LAST = 50  # steps whose mean loss is the level that a training has converged to
SHOWN = 12  # pictures on the sheet of reconstructions


@dataclass(frozen=True)
class TokenizerSize:
    """Shape of the tokenizer and the budget of each training; the way to the codebook is left out.

    After a step without quantisation every book begins at outputs of the encoder, the fixed one too.
    """

    shape: ImageTokenizerConfig
    train: ImageTokenizerTrainConfig


_EMOJI = PRESETS["emoji"]
SIZES: dict[str, TokenizerSize] = {
    "small": TokenizerSize(
        ImageTokenizerConfig(
            num_codes=512,
            code_dim=48,
            channels=64,
            stages=2,
            residual_blocks=1,
            patches=True,
            image_size=32,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        ImageTokenizerTrainConfig(
            steps=300,
            batch_size=32,
            learning_rate=1e-3,
            commitment=0.02,
            warmup_steps=1,
            checkpoint_every=200,
            keep=1,
        ),
    ),
    "paper": TokenizerSize(_EMOJI.image_tokenizer, _EMOJI.image_tokenizer_train),
}


@dataclass(frozen=True)
class TokenizerStudy:
    """What :func:`study_tokenizers` does."""

    out: StrPath
    size: TokenizerSize = SIZES["small"]
    seeds: int = STUDY_SEEDS
    device: str = field(default_factory=default_device)
    progress: bool = True

    def __post_init__(self) -> None:
        require_seeds(self.seeds)


@dataclass(frozen=True)
class TokenizerStudySettings:
    """What a study was started with, ``settings.json`` in its folder."""

    size: TokenizerSize


def study_tokenizers(options: TokenizerStudy) -> list[dict[str, Any]]:
    """Train every method with every seed; returns one record per training.

    Each training is kept in ``runs/`` below ``out``, so that an interrupted study goes on where it stopped.
    At the end, writes ``tokenizers.json`` (all records), ``tokenizers.csv`` (the table), ``tokenizers.png``
    (the figure) and ``reconstructions.png`` (held-out pictures, then what each method with the first seed
    makes of them).

    Raises:
        ValueError: the folder holds a study of another size.
    """
    out = Path(options.out)
    claim_settings(out / "settings.json", TokenizerStudySettings(options.size))
    pairs, held_out = training_pairs(), held_out_combinations()
    trained = {
        (method, seed): _train(options, method, seed, pairs)
        for seed, method in itertools.product(range(options.seeds), METHODS)
    }
    size = options.size.shape.image_size
    real, judge = held_out.images(size), EmojiJudge(size)
    rebuilt = {key: _rebuild(tokenizer, real) for key, (tokenizer, _) in trained.items()}
    records = [
        {
            "method": method,
            "seed": seed,
            "loss": history["reconstruction"][options.size.train.warmup_steps :],
            "codes_used": history["codes_used"][options.size.train.warmup_steps :],
            **_quality(judge, held_out, real, *rebuilt[method, seed]),
        }
        for (method, seed), (_, history) in trained.items()
    ]
    write_json(out / "tokenizers.json", {"trainings": records})
    rows = tokenizer_rows(records)
    write_csv(out / "tokenizers.csv", rows[0], (row.values() for row in rows))
    save_tokenizer_plot(out / "tokenizers.png", records)
    shown = [real, *(rebuilt[method, 0][0] for method in METHODS)]
    save_overview(
        out / "reconstructions.png",
        picture_grid([[to_picture(image) for image in images[:: _stride(images)]] for images in shown]),
    )
    return records


def _stride(images: Tensor) -> int:
    return -(-len(images) // SHOWN)


def _train(
    options: TokenizerStudy, method: CodebookMethod, seed: int, pairs: EmojiPairs
) -> tuple[ImageTokenizer, History]:
    """A finished tokenizer and its history."""
    folder = Path(options.out) / "runs" / f"{method}-seed{seed}"
    config = dataclasses.replace(options.size.train, codebook=method, seed=seed)
    if options.progress:
        print(f"{method}, seed {seed}", flush=True)
    torch.manual_seed(derive_seed(seed, "study of tokenizers"))
    tokenizer = new_image_tokenizer(options.size.shape, config).to(options.device)
    return tokenizer, finish_tokenizer(tokenizer, pairs, config, folder, progress=options.progress)


def _rebuild(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, int]:
    """What is left of pictures after encoding and decoding, and how many codes that took."""
    codes = tokenizer.encode(images.to(tokenizer.mean.device))
    return tokenizer.decode(codes).cpu(), len(codes.unique())


def _quality(
    judge: EmojiJudge, pairs: EmojiPairs, real: Tensor, rebuilt: Tensor, codes: int
) -> dict[str, float]:
    """Of held-out pictures: what is kept; tone and drawing among those that the judge reads when real."""
    expected, original, found = judge.expected(pairs), judge(real), judge(rebuilt)
    readable = (original.tones == expected.tones) & (original.drawings == expected.drawings)
    return {
        "psnr_db": -10 * math.log10(F.mse_loss(rebuilt, real).item()),
        "codes_of_held_out_pictures": codes,
        "tone": (found.tones == expected.tones)[readable].double().mean().item(),
        "drawing": (found.drawings == expected.drawings)[readable].double().mean().item(),
    }


def level(record: Mapping[str, Any]) -> float:
    """The L2 loss that a training has converged to."""
    last = record["loss"][-LAST:]
    return sum(last) / len(last)


def tokenizer_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row of the table per training."""
    return [
        {
            "method": record["method"],
            "seed": record["seed"],
            "L2 loss": level(record),
            "codes in a batch": record["codes_used"][-1],
            "held out: PSNR (dB)": record["psnr_db"],
            "codes": record["codes_of_held_out_pictures"],
            "tone read": record["tone"],
            "drawing read": record["drawing"],
        }
        for record in records
    ]


def tokenizer_table(records: Sequence[Mapping[str, Any]], tablefmt: str = "simple") -> str:
    """The rows of :func:`tokenizer_rows` as text."""
    return tabulate(tokenizer_rows(records), headers="keys", tablefmt=tablefmt, floatfmt=".4g")


def tokenizer_finding(records: Sequence[Mapping[str, Any]]) -> str:
    """Whether all methods came to a similar level, as the paper claims."""
    levels = {
        method: [level(record) for record in records if record["method"] == method] for method in METHODS
    }
    means = {method: sum(values) / len(values) for method, values in levels.items()}
    best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    above = means[worst] / means[best] - 1
    is_similar = above <= SIMILAR
    return (
        f"All four converge to a similar level, even the fixed book: {str(is_similar).lower()} here. The "
        f"worst ({worst}, {means[worst]:.5f}) is {above:.0%} above the best ({best}, {means[best]:.5f}); "
        f"similar means at most {SIMILAR:.0%}."
    )
