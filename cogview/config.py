# SPDX-License-Identifier: Apache-2.0
"""Every option of the package as a frozen dataclass. Named sets of them are in ``presets``."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal


def _require(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


MOST_WORKERS = 256  # More processes or threads than any machine has a use for.
MOST_STEPS = 99_999_999  # The name of a checkpoint has eight digits.
MOST_PICTURES = 100_000  # of one text in one call
STUDY_SEEDS = 3  # trainings of each variant of a study, unless told otherwise
MOST_SEEDS = 10_000  # of a study
MOST_PIXELS = 1 << 14  # of a picture's side
# Of weights, rates and the like. Sums of products with it over a batch must stay finite in float32.
MOST_FACTOR = 1e9


def _require_between(settings: object, least: float, most: float, *names: str) -> None:
    """Both ends included. NaN lies nowhere, and infinity only where ``most`` says so."""
    for name in names:
        value = getattr(settings, name)
        _require(least <= value <= most, name, f"from {least:,} to {most:,}", value)


def _require_count(settings: object, least: int, most: int, *names: str) -> None:
    """Whole numbers, both ends included. A float such as ``1e4`` would fail only where steps are counted."""
    _require_between(settings, least, most, *names)
    for name in names:
        value = getattr(settings, name)
        _require(isinstance(value, Integral), name, "a whole number", value)


def require_workers(least: int, workers: int) -> None:
    """ValueError for a number of processes or threads that would stop the machine."""
    _require(least <= workers <= MOST_WORKERS, "workers", f"from {least} to {MOST_WORKERS}", workers)


def require_seeds(seeds: int) -> None:
    """ValueError for a number of trainings of each variant that no study ends with."""
    fits = isinstance(seeds, Integral) and 1 <= seeds <= MOST_SEEDS
    _require(fits, "seeds", f"a whole number from 1 to {MOST_SEEDS:,}", seeds)


def _require_finite(settings: object, *names: str) -> None:
    """Numbers, or tuples of them, that are 0 or above, and not so large that what they weigh overflows."""
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        fits = all(0 <= number <= MOST_FACTOR for number in numbers)
        _require(fits, name, f"finite, from 0 to {MOST_FACTOR:,.0f}", value)


# How the codebook of a VQ-VAE is learned, or that it is not: see ``Quantizer`` in ``cogview.tokens.vqvae``.
CodebookMethod = Literal["moving-average", "straight-through", "gumbel", "fixed"]

TrainPrecision = Literal["fp32", "bf16", "fp16"]


def _require_precision(precision: str) -> None:
    known = precision in typing.get_args(TrainPrecision)
    _require(known, "precision", '"fp32", "bf16" or "fp16"', precision)


@dataclass(frozen=True)
class VQGANConfig:
    """What a VQGAN's shape has beside that of other tokenizers; by default, as in taming-transformers.

    ``channels`` times a multiplier are the channels of a level; there is one level more than halvings.
    """

    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2  # of each level of the encoder; the decoder's have one more
    attention_levels: tuple[int, ...] = (4,)  # 0 is the full size; attention in the middle is always there
    latent_channels: int = 256  # between encoder and codes, and between codes and decoder

    def __post_init__(self) -> None:
        _require_count(self, 1, 100, "residual_blocks")
        _require_count(self, 1, 1 << 20, "latent_channels")
        _require(min(self.multipliers, default=0) >= 1, "multipliers", "1 or more each", self.multipliers)
        last = len(self.multipliers) - 1
        fits = all(0 <= level <= last for level in self.attention_levels)
        _require(fits, "attention_levels", f"from 0 to {last}", self.attention_levels)


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Shape of the image tokenizer, a VQ-VAE or, with ``vqgan``, a VQGAN.

    The defaults are the released VQ-VAE: 256 px to 32 x 32 codes.
    """

    num_codes: int = 8192
    code_dim: int = 256
    channels: int = 512
    stages: int = 3  # stride-2 convolutions, so an image shrinks by 2**stages
    residual_blocks: int = 0  # on the code grid, of encoder and decoder each: codes know their surroundings
    patches: bool = False  # one convolution takes each code's cell, in place of the strided ones: cheaper
    image_size: int = 256
    pixel_mean: tuple[float, float, float] = (0.79093, 0.76271, 0.75340)
    pixel_std: tuple[float, float, float] = (0.30379, 0.32279, 0.32800)
    vqgan: VQGANConfig | None = None

    def __post_init__(self) -> None:
        if self.vqgan is not None:
            levels = self.stages + 1
            fits = len(self.vqgan.multipliers) == levels
            _require(fits, "vqgan.multipliers", f"one for each of {levels} levels", self.vqgan.multipliers)
            _require(not self.patches, "patches", "False for a VQGAN", self.patches)
            blocks = self.residual_blocks
            _require(blocks == 0, "residual_blocks", "0 for a VQGAN, which has vqgan.residual_blocks", blocks)
        _require_count(self, 1, 16, "stages")
        _require_count(self, 0, 100, "residual_blocks")
        _require_count(self, 1, 1 << 20, "num_codes", "code_dim", "channels")
        _require_count(self, 1, MOST_PIXELS, "image_size")
        _require_finite(self, "pixel_mean", "pixel_std")
        _require(min(self.pixel_std) > 0, "pixel_std", "above 0", self.pixel_std)
        fits = self.image_size >= 1 and self.image_size % 2**self.stages == 0
        _require(fits, "image_size", f"a positive multiple of {2**self.stages}", self.image_size)

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.image_size // 2**self.stages

    @property
    def codes_per_image(self) -> int:
        """Codes of one image, in raster order."""
        return self.grid**2


@dataclass(frozen=True)
class VQGANTrainConfig:
    """What the training of a VQGAN has beside that of a VQ-VAE. Weights are those of taming-transformers."""

    perceptual: float = 1.0  # weight of the distance between features, beside that of pixels
    lpips: str = ""  # folder with the two files of LPIPS; without it, features of EfficientNet-Lite0
    adversarial: float = 0.8  # weight of the discriminator, beside the one that adapts to the gradients
    discriminator_start: int = 10_000  # the step from which on the discriminator plays
    discriminator_channels: int = 64
    discriminator_layers: int = 3  # of stride 2: how large a patch is that it judges

    def __post_init__(self) -> None:
        _require_finite(self, "perceptual", "adversarial")
        _require_count(self, 0, MOST_STEPS, "discriminator_start")
        _require_count(self, 1, 1 << 20, "discriminator_channels")
        _require_count(self, 1, 16, "discriminator_layers")

    @property
    def smallest_image(self) -> int:
        """Pixels of the smallest side that the discriminator can judge."""
        return 3 * 2**self.discriminator_layers


@dataclass(frozen=True)
class ImageTokenizerTrainConfig:
    """How the image tokenizer is trained, and by which of four ways to a codebook.

    A VQ-VAE: pixel MSE plus commitment. A VQGAN: mean absolute error in place of it, and ``vqgan``.
    """

    steps: int = 50_000
    batch_size: int = 64
    learning_rate: float = 3e-4
    commitment: float = 0.25
    color_weight: float = 0.0  # of the error of each code's mean colour, beside that of the pixels
    codebook: CodebookMethod = "moving-average"
    warmup_steps: int = 0  # without quantisation; the book then begins at what the encoder has learned
    precision: TrainPrecision = "fp32"  # of activations; weights are always fp32
    checkpoint_every: int = 1000
    keep: int = 3  # checkpoints that are kept, the last ones
    seed: int = 0
    vqgan: VQGANTrainConfig | None = None

    def __post_init__(self) -> None:
        _require_count(self, 1, MOST_STEPS, "steps", "checkpoint_every", "keep")
        _require_count(self, 1, 1 << 24, "batch_size")
        _require_finite(self, "learning_rate", "commitment", "color_weight")
        _require_count(self, 0, self.steps, "warmup_steps")
        _require_precision(self.precision)
        known = typing.get_args(CodebookMethod)
        _require(self.codebook in known, "codebook", f"one of {', '.join(known)}", self.codebook)


@dataclass(frozen=True)
class ClipTrainConfig:
    """How the heads of the small CLIP are trained."""

    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    image_size: int = 32  # at which pictures are read, whatever the tower enlarges them to
    checkpoint_every: int = 1000
    keep: int = 3  # checkpoints that are kept, the last ones
    seed: int = 0

    def __post_init__(self) -> None:
        _require_count(self, 1, MOST_STEPS, "steps", "checkpoint_every", "keep")
        _require_count(self, 2, 1 << 24, "batch_size")
        _require_count(self, 1, MOST_PIXELS, "image_size")
        _require_finite(self, "learning_rate", "weight_decay")


@dataclass(frozen=True)
class ClipGenTrainConfig:
    """How CLIP-GEN's transformer is trained, from pictures alone."""

    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.03
    weight_decay: float = 0.04
    embedding_noise: float = 0.0  # length of the noise on embeddings of length 1: texts lie beside pictures
    embedding_loss: float = 0.0  # weight of 1 - cosine between the embeddings of input and of what is drawn
    precision: TrainPrecision = "fp32"  # of activations; weights are always fp32
    checkpoint_every: int = 500
    keep: int = 3  # checkpoints that are kept, the last ones
    seed: int = 0

    def __post_init__(self) -> None:
        _require_count(self, 1, MOST_STEPS, "steps", "checkpoint_every", "keep")
        _require_count(self, 1, 1 << 24, "batch_size")
        _require_between(self, 0, 1, "warmup_fraction")
        _require_finite(self, "learning_rate", "weight_decay", "embedding_noise", "embedding_loss")
        _require_precision(self.precision)


@dataclass(frozen=True)
class ThreeRegionConfig:
    """Sizes of three-region attention: window of ``window_blocks`` blocks, ``num_pivots`` far keys.

    The pivots of a row are its positions without an image code, padding included, and random image codes.
    """

    block_size: int = 128
    window_blocks: int = 6
    num_pivots: int = 768
    density_correction: bool = True

    def __post_init__(self) -> None:
        _require_count(self, 1, 1 << 24, "block_size", "window_blocks", "num_pivots")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer. ``three_region`` None trains with dense causal attention.

    ``pb_relax`` "tensor" reproduces the numerics under which the released weights were trained; "row"
    does not depend on the other rows of the batch.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int = 58240
    max_positions: int = 1089
    init_std: float = 0.02  # of all weights; about 1 / sqrt(hidden_size) in the released model
    dropout: float = 0.1  # embeddings, attention probabilities and branch outputs alike
    pb_relax: Literal["row", "tensor"] | None = "row"
    sandwich_norm: bool = True  # False: plain pre-LN, without the norms that end the branches
    three_region: ThreeRegionConfig | None = None
    # recompute each layer in the backward pass, to the same bits, rather than keep its activations
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require_count(self, 1, 1000, "num_layers")
        _require_count(self, 1, 1 << 20, "hidden_size", "num_heads")
        _require_count(self, 1, 1 << 24, "vocab_size", "max_positions")
        _require_finite(self, "init_std")
        divides = self.hidden_size % self.num_heads == 0
        _require(divides, "num_heads", f"a divisor of hidden_size {self.hidden_size}", self.num_heads)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        _require(
            self.pb_relax in ("row", "tensor", None), "pb_relax", '"row", "tensor" or None', self.pb_relax
        )


@dataclass(frozen=True)
class TrainConfig:
    """How the transformer is trained. The defaults are those of the paper where it states them."""

    steps: int = 144_000
    batch_size: int = 6144
    learning_rate: float = 3e-4
    warmup_fraction: float = 0.02
    final_lr_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.04
    clip_norm: float = 1.0
    text_weight: float = 1.0  # loss weight where the input token is not an image code
    caption_fraction: float = 0.5  # share of rows in image-to-text order
    checkpoint_every: int = 1000
    keep: int = 3  # checkpoints that are kept, the last ones
    seed: int = 0
    precision: TrainPrecision = "fp32"  # of activations; weights are always fp32
    accumulate: int = 1  # parts of a batch, one after another: less memory
    log_every: int = 1  # steps that the device does between two reports
    compile_layers: bool = False  # by torch.compile, which needs a compiler
    samples_every: int = 0  # steps between two sheets of pictures in TensorBoard, 0 = none
    sample_texts: tuple[str, ...] = ()  # what they show; by default the first four captions of the data
    validation: float = 0.0  # share of the images that is not trained on; its loss is told at each checkpoint
    embedding_gradient: float = 1.0  # factor on the gradient of looked-up word embeddings; 0.1 in the paper
    text_dropout: float = 0.0  # share of text-to-image rows that lose their text, for guidance when drawing
    code_dropout: float = 0.0  # share of rows in which some image codes are hidden, so that the text must do
    codebook_embeddings: bool = False  # word embeddings of image codes begin alike where the codes look alike
    resblock_scaling: bool = False  # fp16: a scale for each residual block, as DALL-E, rather than the loss

    def __post_init__(self) -> None:
        _require_count(self, 1, MOST_STEPS, "steps", "checkpoint_every", "keep")
        _require_count(self, 1, 1 << 24, "batch_size")
        _require_between(self, 0, 1, "warmup_fraction", "final_lr_fraction")
        _require_between(self, 0, math.inf, "clip_norm")
        _require_finite(self, "learning_rate", "betas", "weight_decay", "text_weight")
        _require(max(self.betas) < 1, "betas", "below 1", self.betas)
        _require_precision(self.precision)
        _require_count(self, 1, MOST_STEPS, "log_every")
        _require_count(self, 0, MOST_STEPS, "samples_every")
        _require(0 <= self.validation < 1, "validation", "in [0, 1)", self.validation)
        shrinks = 0 < self.embedding_gradient <= 1
        _require(shrinks, "embedding_gradient", "in (0, 1]", self.embedding_gradient)
        narrow = self.precision == "fp16" or not self.resblock_scaling
        _require(narrow, "resblock_scaling", "False unless precision is fp16", self.resblock_scaling)
        fits = isinstance(self.accumulate, Integral) and 1 <= self.accumulate <= self.batch_size
        _require(
            fits, "accumulate", f"a whole number from 1 to batch_size {self.batch_size}", self.accumulate
        )
        _require(0 <= self.text_dropout < 1, "text_dropout", "in [0, 1)", self.text_dropout)
        _require(0 <= self.code_dropout <= 1, "code_dropout", "in [0, 1]", self.code_dropout)
        # Without text loss, pictures come out unrelated to the text (the paper's finding).
        _require(self.text_weight > 0, "text_weight", "above 0", self.text_weight)
        in_range = 0 <= self.caption_fraction <= 1
        _require(in_range, "caption_fraction", "in [0, 1]", self.caption_fraction)


@dataclass(frozen=True)
class SamplingConfig:
    """From logits to a token: guidance, then temperature, then top-k (0 = off), then top-p (0 = off).

    Temperature 0 takes the likeliest token. With guidance g the logits are ``without + g * (with - without)``
    the text, which costs a second row for each; 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 200
    top_p: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        is_number = 0 <= self.temperature < math.inf
        _require(
            is_number, "temperature", "a finite number, 0 (the likeliest token) or above", self.temperature
        )
        is_count = isinstance(self.top_k, Integral) and self.top_k >= 0
        _require(is_count, "top_k", "a whole number, 0 (off) or more", self.top_k)
        _require(0 <= self.top_p <= 1, "top_p", "in [0, 1], 0 meaning off", self.top_p)
        # Beyond that only the likeliest code is left, and then the products overflow.
        _require(0 <= self.guidance <= 1000, "guidance", "from 0 to 1,000, 1 meaning off", self.guidance)

    @property
    def branches(self) -> int:
        """Rows that a text takes: with guidance one more, without the text."""
        return 1 if self.guidance == 1 else 2


@dataclass(frozen=True)
class Preset:
    """Everything that a run needs to know except its data and its folder.

    Vocabulary, positions and the room for text of a run follow from its data; here they are what data of
    the full size give.
    """

    model: ModelConfig
    train: TrainConfig
    image_tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()
    image_tokenizer_train: ImageTokenizerTrainConfig = ImageTokenizerTrainConfig()
    text_pieces: int = 50_000  # of a newly trained text tokenizer; fewer where the captions hold no more
    min_text_tokens: int = 60  # room for a text, however short the captions are
    max_text_tokens: int = 60  # a longer caption loses its end, never the image its tail
    sampling: SamplingConfig = SamplingConfig()
    name: str = field(default="", compare=False)  # under which ``presets`` lists it

    def __post_init__(self) -> None:
        _require_count(self, 1, 1 << 24, "text_pieces", "min_text_tokens")
        at_least = f"at least min_text_tokens {self.min_text_tokens}"
        _require(
            self.max_text_tokens >= self.min_text_tokens, "max_text_tokens", at_least, self.max_text_tokens
        )
        shape, training = self.image_tokenizer.vqgan, self.image_tokenizer_train.vqgan
        both = (shape is None) == (training is None)
        _require(both, "image_tokenizer_train.vqgan", "given where image_tokenizer.vqgan is", training)
