# SPDX-License-Identifier: Apache-2.0
"""What a discriminator and a perceptual loss make of an image tokenizer, at as many codes.

A VQ-VAE and a VQGAN of the same preset, data, steps and codebook, on pictures that neither was trained on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from cogview.config import Preset
from cogview.data.digits import DigitPairs
from cogview.data.digits import training_pairs as digit_training
from cogview.data.emoji import held_out_combinations
from cogview.data.emoji import training_pairs as emoji_training
from cogview.data.pairs import Pairs
from cogview.device import default_device
from cogview.evaluation.likeness import Likeness
from cogview.evaluation.studied_tokenizer import finish_tokenizer
from cogview.files import StrPath, write_json
from cogview.images import picture_grid, save_overview, to_picture
from cogview.presets import PRESETS, with_vqgan
from cogview.seeding import derive_seed
from cogview.settings import claim_settings
from cogview.tokens.vqvae import ImageTokenizer
from cogview.training.image_tokenizer import new_image_tokenizer

KINDS = ("vqvae", "vqgan")
SIZES: dict[str, Preset] = {"small": PRESETS["digits"], "paper": PRESETS["emoji"]}
SHOWN = 16  # pictures on the sheet
RATE = 1e-3  # of the VQGAN, where the preset's is above it; no other has been tried against a discriminator


@dataclass(frozen=True)
class VQGANStudy:
    """What :func:`study_vqgan` does."""

    out: StrPath
    preset: Preset = SIZES["small"]
    device: str = field(default_factory=default_device)
    progress: bool = True


@dataclass(frozen=True)
class VQGANStudySettings:
    """What a study was started with, ``settings.json`` in its folder."""

    vqvae: Preset
    vqgan: Preset


def study_vqgan(options: VQGANStudy) -> list[dict[str, Any]]:
    """Train both and measure both; returns one record each.

    Each tokenizer is kept below ``out``, so that an interrupted study goes on where it stopped. At the end,
    writes ``vqgan.json`` and ``vqgan.png``: held-out pictures, then what each tokenizer makes of them.

    Raises:
        ValueError: the folder has a study of other settings.
    """
    out = Path(options.out)
    gan = with_vqgan(options.preset)
    rate = min(RATE, gan.image_tokenizer_train.learning_rate)
    gan = dataclasses.replace(
        gan, image_tokenizer_train=dataclasses.replace(gan.image_tokenizer_train, learning_rate=rate)
    )
    presets = dict(zip(KINDS, (options.preset, gan), strict=True))
    claim_settings(out / "settings.json", VQGANStudySettings(**presets))
    training, held_out = _pictures(options.preset)
    size = options.preset.image_tokenizer.image_size
    real = torch.stack([held_out.image(index, size) for index in range(len(held_out))])
    likeness = Likeness(real)
    records, rebuilt = [], []
    for kind, preset in presets.items():
        tokenizer = _tokenizer(kind, preset, training, options)
        codes = tokenizer.encode(real.to(tokenizer.mean))
        images = tokenizer.decode(codes).cpu()
        rebuilt.append(images)
        records.append(
            {
                "kind": kind,
                "codes": len(codes.unique()),
                "psnr_db": -10 * math.log10(F.mse_loss(images, real).item()),
                **likeness(images),
            }
        )
    write_json(out / "vqgan.json", {"tokenizers": records})
    stride = -(-len(real) // SHOWN)
    rows = [[to_picture(image) for image in images[::stride]] for images in (real, *rebuilt)]
    save_overview(out / "vqgan.png", picture_grid(rows))
    return records


def _pictures(preset: Preset) -> tuple[Pairs, Pairs]:
    """The pictures to train on, and those that are kept back."""
    if preset.name.startswith("emoji"):
        return emoji_training(), held_out_combinations()
    return digit_training(), DigitPairs("test")


def _tokenizer(kind: str, preset: Preset, pairs: Pairs, options: VQGANStudy) -> ImageTokenizer:
    """A finished tokenizer."""
    training = preset.image_tokenizer_train
    torch.manual_seed(derive_seed(training.seed, "study of the VQGAN"))
    tokenizer = new_image_tokenizer(preset.image_tokenizer, training).to(options.device)
    finish_tokenizer(tokenizer, pairs, training, Path(options.out) / kind, progress=options.progress)
    return tokenizer


def vqgan_table(records: Sequence[Mapping[str, Any]], tablefmt: str = "simple") -> str:
    """The records as text."""
    names = {
        "kind": "tokenizer",
        "psnr_db": "PSNR (dB)",
        "feature_distance": "1 - cosine of features",
        "sharpness": "sharpness (1 = real)",
        "codes": "codes used",
    }
    rows = [{title: record[name] for name, title in names.items()} for record in records]
    return tabulate(rows, headers="keys", tablefmt=tablefmt, floatfmt=".4g")
