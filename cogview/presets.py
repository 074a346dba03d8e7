# SPDX-License-Identifier: Apache-2.0
"""The named presets: all sizes and schedules of a run under one name."""

from __future__ import annotations

import dataclasses
import os

from cogview.config import (
    ImageTokenizerConfig,
    ImageTokenizerTrainConfig,
    ModelConfig,
    Preset,
    SamplingConfig,
    ThreeRegionConfig,
    TrainConfig,
    VQGANConfig,
    VQGANTrainConfig,
)
from cogview.files import StrPath
from cogview.settings import load_tokenizer_settings

_PRESETS: dict[str, Preset] = {
    # 8x8 scans of handwritten digits, doubled to 16x16 px, as 4x4 codes: minutes on two CPU cores.
    "digits": Preset(
        model=ModelConfig(
            num_layers=3,
            hidden_size=128,
            num_heads=4,
            init_std=0.04,
            dropout=0.1,  # without it CapLoss ranks by chance turns of phrase, not by the digit
            vocab_size=256,
            max_positions=26,
            three_region=ThreeRegionConfig(block_size=4, window_blocks=2, num_pivots=16),
        ),
        train=TrainConfig(
            steps=2400,
            batch_size=64,
            learning_rate=2e-3,
            warmup_fraction=0.03,
            text_weight=2.0,
            caption_fraction=0.4,
            checkpoint_every=100,
        ),
        image_tokenizer=ImageTokenizerConfig(
            num_codes=48,
            code_dim=32,
            channels=48,
            stages=2,
            image_size=16,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        image_tokenizer_train=ImageTokenizerTrainConfig(
            steps=500, batch_size=64, learning_rate=2e-3, checkpoint_every=100
        ),
        text_pieces=130,
        min_text_tokens=5,  # what every caption of the digits has
        sampling=SamplingConfig(temperature=0.6, top_k=0),
    ),
    # OpenMoji's drawings at 32x32 px, as 8x8 codes: an hour on two CPU cores with AMX, 130 minutes on others
    # by estimate, minutes on one GPU. The residual blocks give a code its surroundings, without which a small
    # patch of skin is as good as any other brown.
    "emoji": Preset(
        model=ModelConfig(
            num_layers=5,
            hidden_size=256,
            num_heads=8,
            init_std=0.04,
            dropout=0.0,  # with 0.1 fewer drawings were right
            vocab_size=8192,
            max_positions=86,
            three_region=ThreeRegionConfig(block_size=8, window_blocks=4, num_pivots=48),
        ),
        train=TrainConfig(
            steps=3560,
            batch_size=64,
            learning_rate=1.2e-3,
            warmup_fraction=0.03,
            text_weight=2.0,
            caption_fraction=0.3,
            text_dropout=0.1,  # for --guidance
            code_dropout=0.85,  # or a model of so few pictures hardly reads
            codebook_embeddings=True,
            checkpoint_every=200,
        ),
        image_tokenizer=ImageTokenizerConfig(
            num_codes=4096,
            code_dim=48,  # the numbers of a cell of 4x4 pixels: training begins without a loss
            channels=96,
            stages=2,
            residual_blocks=3,
            patches=True,
            image_size=32,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        # With a commitment of 0.25, encoder outputs shrank to a line, and the book had little to tell apart.
        image_tokenizer_train=ImageTokenizerTrainConfig(
            steps=9000,
            batch_size=32,
            learning_rate=1e-3,
            commitment=0.02,
            color_weight=4.0,
            warmup_steps=1,
            checkpoint_every=250,
        ),
        text_pieces=4000,
        min_text_tokens=17,  # what the longest caption has
        max_text_tokens=40,
        sampling=SamplingConfig(temperature=0.7, top_k=100, guidance=1.5),
    ),
    # The same at 64x64 px, as 16x16 codes, for one GPU with bfloat16. Nobody has trained the transformer yet;
    # the image tokenizer keeps 97 % of tones and of drawings, after 20 minutes of one CPU core with AMX.
    "emoji-64": Preset(
        model=ModelConfig(
            num_layers=12,
            hidden_size=512,
            num_heads=8,
            init_std=0.03,
            vocab_size=6144,
            max_positions=278,
            three_region=ThreeRegionConfig(block_size=32, window_blocks=3, num_pivots=128),
        ),
        train=TrainConfig(
            steps=12_000,
            batch_size=64,
            learning_rate=8e-4,
            warmup_fraction=0.03,
            text_weight=2.0,
            caption_fraction=0.3,
            text_dropout=0.1,  # for --guidance
            code_dropout=0.85,
            codebook_embeddings=True,
            checkpoint_every=500,
            precision="bf16",
            log_every=10,
        ),
        image_tokenizer=ImageTokenizerConfig(
            num_codes=2048,
            code_dim=48,
            channels=96,
            stages=2,
            residual_blocks=3,
            patches=True,
            image_size=64,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        image_tokenizer_train=ImageTokenizerTrainConfig(
            steps=6000,
            batch_size=32,
            learning_rate=1e-3,
            commitment=0.02,
            color_weight=4.0,
            warmup_steps=1,
            checkpoint_every=500,
            precision="bf16",
        ),
        text_pieces=4000,
        min_text_tokens=17,
        max_text_tokens=40,
        sampling=SamplingConfig(temperature=0.7, top_k=100, guidance=1.5),
    ),
    # A folder of one's own pictures at 64x64 px, as 8x8 codes: one to two hours on two CPU cores, by
    # estimate. Rows are so short that dense attention is the faster one.
    "small": Preset(
        model=ModelConfig(
            num_layers=6,
            hidden_size=256,
            num_heads=4,
            init_std=0.04,
            vocab_size=4608,
            max_positions=99,
        ),
        train=TrainConfig(
            steps=3000,
            batch_size=32,
            learning_rate=1e-3,
            warmup_fraction=0.03,
            text_weight=2.0,
            checkpoint_every=100,
        ),
        image_tokenizer=ImageTokenizerConfig(
            num_codes=512,
            code_dim=64,
            channels=96,
            stages=3,
            image_size=64,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        image_tokenizer_train=ImageTokenizerTrainConfig(
            steps=2000, batch_size=32, learning_rate=1e-3, checkpoint_every=100
        ),
        text_pieces=4000,
        min_text_tokens=30,
        max_text_tokens=120,
        sampling=SamplingConfig(temperature=0.9, top_k=100),
    ),
    # Ten to a hundred thousand pictures of one's own at 128x128 px, as 16x16 codes, on one card of 24 GB with
    # bfloat16 (RTX 3090 and later, A10, L4). A step has 19,000 tokens; 30,000 of them show 50,000 pictures
    # some 40 times, which dropout makes useful. Rows of 300 tokens need no sparse attention.
    "card": Preset(
        model=ModelConfig(
            num_layers=12,
            hidden_size=768,
            num_heads=12,
            vocab_size=9088,
            max_positions=301,
        ),
        train=TrainConfig(
            steps=30_000,
            batch_size=64,
            learning_rate=5e-4,
            warmup_fraction=0.03,
            text_weight=2.0,
            checkpoint_every=500,
            precision="bf16",
            log_every=10,
        ),
        image_tokenizer=ImageTokenizerConfig(
            num_codes=1024,
            channels=256,
            image_size=128,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
        ),
        image_tokenizer_train=ImageTokenizerTrainConfig(steps=20_000, checkpoint_every=500),
        text_pieces=8000,
        min_text_tokens=40,
        max_text_tokens=120,
        sampling=SamplingConfig(top_k=100),
    ),
    # The single-node recipe of the released code.
    "tutorial": Preset(
        model=ModelConfig(num_layers=12, hidden_size=1024, num_heads=16),
        train=TrainConfig(
            steps=20_000,
            batch_size=96,
            learning_rate=4e-4,
            warmup_fraction=0.1,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            text_weight=5.0,
            log_every=10,
        ),
    ),
    # The 4-billion-parameter model of the paper, trained with dense attention.
    "base": Preset(
        model=ModelConfig(num_layers=48, hidden_size=2560, num_heads=40, activation_checkpointing=True),
        train=TrainConfig(log_every=10),
    ),
    # 800 px garments as 50x50 codes, trained with three-region attention. The paper gives the size
    # (3 billion) but not the shape; these layers have that many parameters.
    "fashion": Preset(
        model=ModelConfig(
            num_layers=36,
            hidden_size=2560,
            num_heads=40,
            max_positions=2565,
            three_region=ThreeRegionConfig(),
            activation_checkpointing=True,
        ),
        train=TrainConfig(log_every=10),
        image_tokenizer=ImageTokenizerConfig(
            channels=128,
            stages=4,
            image_size=800,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
            vqgan=VQGANConfig(),
        ),
        # The reference training of the VQGAN: 4.5e-6 times the batch, and its codebook learns by gradient.
        image_tokenizer_train=ImageTokenizerTrainConfig(
            learning_rate=2.9e-4, codebook="straight-through", vqgan=VQGANTrainConfig()
        ),
    ),
}

PRESETS: dict[str, Preset] = {
    name: dataclasses.replace(preset, name=name) for name, preset in _PRESETS.items()
}

# What each preset is for and what it takes. Times are of a whole training; those of the three large ones
# are not known here.
ABOUT: dict[str, str] = {
    "digits": "16 px, the built-in digits: 0.6 million parameters, minutes on two CPU cores",
    "emoji": "32 px, the built-in emoji: 6.1 million parameters, one to two hours on two CPU cores",
    "emoji-64": "64 px, the built-in emoji: 41 million parameters, one GPU",
    "small": "64 px, your own pictures: 6 million parameters, est. 1 to 2 hours on two CPU cores, 1.5 GB",
    "card": "128 px, 10,000 and more pictures of your own: 92 million parameters, one 24 GB card",
    "tutorial": "256 px: 212 million parameters, one large GPU",
    "base": "256 px, the model of the paper: 3,929 million parameters, many GPUs",
    "fashion": "800 px, three-region attention: 2,988 million parameters, many GPUs",
}


# Multipliers of taming-transformers by the number of halvings; more halvings have more ones in front.
_MULTIPLIERS = {1: (1, 2), 2: (1, 2, 4), 3: (1, 2, 2, 4), 4: (1, 1, 2, 2, 4)}


def with_vqgan(preset: Preset) -> Preset:
    """The preset with a VQGAN of as many codes of the same cells in place of its VQ-VAE.

    It has a quarter of the VQ-VAE's channels, 128 for the released one as in taming-transformers. The
    discriminator plays from a fifth of the steps on.
    """
    shape, training = preset.image_tokenizer, preset.image_tokenizer_train
    if shape.vqgan is not None:
        return preset
    halvings = shape.stages
    multipliers = _MULTIPLIERS.get(halvings) or (1,) * (halvings - 4) + _MULTIPLIERS[4]
    channels = max(16, shape.channels // 4)
    layers = max(1, min(3, (shape.image_size // 8).bit_length() - 1))
    return dataclasses.replace(
        preset,
        image_tokenizer=dataclasses.replace(
            shape,
            channels=channels,
            residual_blocks=0,
            patches=False,
            pixel_mean=(0.5, 0.5, 0.5),
            pixel_std=(0.5, 0.5, 0.5),
            vqgan=VQGANConfig(
                multipliers=multipliers,
                residual_blocks=2 if channels >= 64 else 1,
                attention_levels=(halvings,),
                latent_channels=2 * channels,
            ),
        ),
        image_tokenizer_train=dataclasses.replace(
            training,
            commitment=ImageTokenizerTrainConfig.commitment,
            color_weight=0.0,
            warmup_steps=1,
            vqgan=VQGANTrainConfig(
                discriminator_start=training.steps // 5,
                # A small tokenizer is no match for a discriminator of the usual weight.
                adversarial=0.8 if channels >= 64 else 0.1,
                discriminator_channels=max(32, channels // 2),
                discriminator_layers=layers,
            ),
        ),
    )


def default_preset(data: StrPath) -> Preset:
    """The preset for ``data`` unless another is named: that of built-in data, for a folder ``small``."""
    return PRESETS[name if (name := os.fspath(data)) in ("digits", "emoji") else "small"]


def get_preset(name: str) -> Preset:
    """The preset called ``name``; an unknown name is a ValueError that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def implied_preset(folder: StrPath) -> Preset:
    """The preset that fits the tokenizers in a run folder: the one that they were trained with.

    Its sizes of the tokenizers are those of the folder, whatever was changed when they were trained. For a
    folder that does not name its preset, the first one with the same image tokenizer, else ``small``.
    """
    settings = load_tokenizer_settings(folder)
    if settings.preset in PRESETS:
        preset = PRESETS[settings.preset]
    else:
        fitting = [
            preset for preset in PRESETS.values() if preset.image_tokenizer == settings.image_tokenizer
        ]
        preset = fitting[0] if fitting else PRESETS["small"]
    return dataclasses.replace(
        preset,
        image_tokenizer=settings.image_tokenizer,
        image_tokenizer_train=settings.image_tokenizer_train,
        text_pieces=settings.text_pieces,
    )
