# SPDX-License-Identifier: Apache-2.0
"""VQGAN: an image tokenizer of residual blocks and attention, whose training has a discriminator.

Source: Esser, Rombach and Ommer, Taming Transformers, arXiv:2012.09841. Parameter names and shapes are those
of taming-transformers (``encoder``, ``quant_conv``, ``quantize``, ``post_quant_conv``, ``decoder``), so the
state dicts of its ``vqgan_imagenet_f16_*`` load. Letters: B batch, C channels, D code size, K codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerConfig, VQGANConfig
from cogview.tokens.vqvae import DTYPE, ImageTokenizer, Quantizer
from cogview.weights.lazy import LazyTensor

BOOK = "quantize.embedding.weight"
PIXELS = (0.5, 0.5, 0.5)  # mean and standard deviation: taming-transformers has pixels in [-1, 1]


def _conv(inner: int, outer: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inner, outer, kernel, stride, padding, dtype=DTYPE)


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups, or fewer where the channels of a small model do not divide into as many."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6, dtype=DTYPE)


class ResidualBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``; a 1x1 convolution of ``x`` where channels change."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inner), _conv(inner, outer, 3)
        self.norm2, self.conv2 = _norm(outer), _conv(outer, outer, 3)
        if inner != outer:
            self.nin_shortcut = _conv(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    """``x`` and attention of one head among all cells of its normalised form."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (_conv(channels, channels, 1) for _ in range(3))
        self.proj_out = _conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, cells, C]
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Halving(nn.Module):
    """A convolution of stride 2, padded at the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """Each cell four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one size of feature maps, with attention behind each of them if ``attends``."""

    def __init__(self, inner: int, outer: int, blocks: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(inner if number == 0 else outer, outer) for number in range(blocks)
        )
        self.attn = nn.ModuleList(Attention(outer) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for resampling in ("downsample", "upsample"):
            if resampling in self._modules:
                x = self.get_submodule(resampling)(x)
        return x


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResidualBlock(channels, channels), Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to ``latent_channels`` on the code grid."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = _conv(3, channels, 3)
        self.down = nn.ModuleList()
        inner, last = channels, len(config.multipliers) - 1
        for number, multiplier in enumerate(config.multipliers):
            outer = channels * multiplier
            level = Level(inner, outer, config.residual_blocks, number in config.attention_levels)
            if number < last:
                level.downsample = Halving(outer)
            self.down.append(level)
            inner = outer
        self.mid = Middle(inner)
        self.norm_out, self.conv_out = _norm(inner), _conv(inner, config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Mirror of the encoder, with one residual block more at each level."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        inner = channels * config.multipliers[-1]
        self.conv_in = _conv(config.latent_channels, inner, 3)
        self.mid = Middle(inner)
        levels = []
        for number, multiplier in reversed(list(enumerate(config.multipliers))):
            outer = channels * multiplier
            level = Level(inner, outer, config.residual_blocks + 1, number in config.attention_levels)
            if number > 0:
                level.upsample = Doubling(outer)
            levels.append(level)
            inner = outer
        self.up = nn.ModuleList(reversed(levels))  # The names count from the full size.
        self.norm_out, self.conv_out = _norm(inner), _conv(inner, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANQuantizer(Quantizer):
    """The same codebook and ways to learn it, stored as ``embedding.weight`` ``[K, D]``.

    It begins uniform in ``[-1 / K, 1 / K]``.
    """

    def _keep(self, embed: nn.Parameter) -> None:
        code_dim, num_codes = embed.shape
        self.embedding = nn.Embedding(num_codes, code_dim, dtype=DTYPE)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        self.embedding.weight.requires_grad_(False)

    @property
    def embed(self) -> Tensor:  # type: ignore[override]
        """The book as other tokenizers have it, ``[D, K]``: a view."""
        return self.embedding.weight.t()


class VQGAN(ImageTokenizer):
    """Images in [0, 1] to code grids and back, by the networks of taming-transformers."""

    def _make_parts(self, config: ImageTokenizerConfig) -> None:
        assert config.vqgan is not None
        self.encoder = Encoder(config.channels, config.vqgan)
        self.decoder = Decoder(config.channels, config.vqgan)
        self.quantize = VQGANQuantizer(config)
        self.quant_conv = _conv(config.vqgan.latent_channels, config.code_dim, 1)
        self.post_quant_conv = _conv(config.code_dim, config.vqgan.latent_channels, 1)

    @property
    def quantizer(self) -> Quantizer:
        return self.quantize

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients tell how much pixels and discriminator pull."""
        return self.decoder.conv_out.weight

    def _encoder(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def _decoder(self, quantized: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quantized))


def make_image_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """A new VQGAN or VQ-VAE, as its shape says."""
    return ImageTokenizer(config) if config.vqgan is None else VQGAN(config)


def tensors_of_vqgan(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A state dict of taming-transformers as this package has it.

    What belongs to the training's losses is left out. The averages by which a book may move begin at the
    book itself where the file has none.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}
    if BOOK in kept and "quantize.cluster_size" not in kept:
        book = kept[BOOK]
        ones = LazyTensor(book.shape[:1], DTYPE, lambda: torch.ones(book.shape[:1], dtype=DTYPE))
        kept["quantize.cluster_size"] = ones
        kept["quantize.embed_avg"] = LazyTensor(
            book.shape[::-1], book.dtype, lambda: book.read().t().contiguous()
        )
    return kept


def vqgan_config(tensors: Mapping[str, LazyTensor], image_size: int, source: object) -> ImageTokenizerConfig:
    """The shape of a VQGAN from its tensors. ValueError for what is no whole VQGAN."""
    in_encoder = ("conv_in.weight", "conv_out.weight", "down.0.block.0.conv2.bias")
    needed = (BOOK, *(f"encoder.{name}" for name in in_encoder))
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise ValueError(f"{source} is no whole VQGAN of taming-transformers: {absent[0]} is missing")
    found = [re.match(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.", name) for name in tensors]
    parts = {(match[2], int(match[1]), int(match[3])) for match in found if match}
    levels = 1 + max(level for _, level, _ in parts)
    channels = tensors["encoder.conv_in.weight"].shape[0]
    biases = [tensors.get(f"encoder.down.{level}.block.0.conv2.bias") for level in range(levels)]
    widths = [channels if bias is None else bias.shape[0] for bias in biases]
    book = tuple(tensors[BOOK].shape)
    if len(book) != 2:
        raise ValueError(f"{source}: {BOOK} must be a matrix [codes, numbers a code], got shape {list(book)}")
    num_codes, code_dim = book
    return ImageTokenizerConfig(
        num_codes=num_codes,
        code_dim=code_dim,
        channels=channels,
        stages=levels - 1,
        image_size=image_size,
        pixel_mean=PIXELS,
        pixel_std=PIXELS,
        vqgan=VQGANConfig(
            multipliers=tuple(width // channels for width in widths),
            residual_blocks=1 + max(number for kind, _, number in parts if kind == "block"),
            attention_levels=tuple(sorted({level for kind, level, _ in parts if kind == "attn"})),
            latent_channels=tensors["encoder.conv_out.weight"].shape[0],
        ),
    )
