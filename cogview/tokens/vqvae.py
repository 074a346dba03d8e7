# SPDX-License-Identifier: Apache-2.0
"""VQ-VAE: images to discrete codes and back.

Source: CogView, arXiv:2105.13290, and the released code. Parameter names and shapes are those of the
released state dict (``enc_b``, ``quantize_t`` and ``dec``), so its weights load. Letters: B batch,
D code size, K codes in the book, h = w = side of the code grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ImageTokenizerConfig

DTYPE = torch.float32  # of new weights, whatever PyTorch's default is; ``tokenizer.to(dtype)`` for another


class Encoder(nn.Module):
    """``stages`` stride-2 convolutions with ReLU, then a 1x1 convolution to the code size."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for _ in range(config.stages):
            layers += [nn.Conv2d(channels, config.channels, 4, stride=2, padding=1, dtype=DTYPE), nn.ReLU()]
            channels = config.channels
        self.blocks = nn.Sequential(*layers, nn.Conv2d(channels, config.code_dim, 1, dtype=DTYPE))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


class Decoder(nn.Module):
    """Mirror of the encoder."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.code_dim
        for _ in range(config.stages):
            layers += [
                nn.ConvTranspose2d(channels, config.channels, 4, stride=2, padding=1, dtype=DTYPE),
                nn.ReLU(),
            ]
            channels = config.channels
        self.blocks = nn.Sequential(*layers, nn.Conv2d(channels, 3, 1, dtype=DTYPE))

    def forward(self, codes: Tensor) -> Tensor:
        return self.blocks(codes)


class Quantizer(nn.Module):
    """Nearest code by squared distance; the book follows the encoder by moving averages.

    ``embed`` is stored transposed, ``[D, K]``. In training, a code that on average serves fewer than
    ``revive_below`` vectors a step restarts at a random encoder output; in the first step that is nearly
    all of them. Without it most of a small book is never used.
    """

    decay = 0.99
    eps = 1e-5
    revive_below = 0.5

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        embed = torch.empty(config.code_dim, config.num_codes, dtype=DTYPE)
        nn.init.xavier_uniform_(embed, gain=nn.init.calculate_gain("tanh"))
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(config.num_codes, dtype=DTYPE))
        self.register_buffer("embed_avg", embed.clone())

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code for each ``[..., D]`` vector; int64 ``[...]``."""
        flat = z.reshape(-1, z.shape[-1])
        # |z|^2 is the same for every code, so it is left out of the comparison.
        distance = self.embed.square().sum(0) - 2 * flat @ self.embed
        return distance.argmin(1).view(z.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """``[...]`` indices to ``[..., D]`` vectors."""
        return F.embedding(codes, self.embed.t())

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """Move the book towards the vectors ``z`` that were assigned ``codes``."""
        z, codes = z.reshape(-1, z.shape[-1]), codes.reshape(-1)
        num_codes = self.embed.shape[1]
        counts = torch.bincount(codes, minlength=num_codes).to(z.dtype)
        sums = torch.zeros_like(self.embed).index_add_(1, codes, z.t())
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)

        dead = self.cluster_size < self.revive_below
        fresh = z[torch.randint(len(z), (num_codes,), device=z.device)].t()
        self.embed_avg.copy_(torch.where(dead, fresh, self.embed_avg))
        self.cluster_size.masked_fill_(dead, 1.0)

        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + num_codes * self.eps) * total
        self.embed.copy_(self.embed_avg / smoothed)


class Reconstruction(NamedTuple):
    """What one training pass returns."""

    images: Tensor  # [B, 3, H, W], not clamped: the gradient must not vanish outside [0, 1]
    codes: Tensor  # [B, h, w] int64
    commitment: Tensor  # mean squared distance from encoder output to its (fixed) code


class ImageTokenizer(nn.Module):
    """Images in [0, 1] to code grids and back.

    Fully convolutional: any height and width divisible by ``2**stages`` work.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_b = Encoder(config)
        self.quantize_t = Quantizer(config)
        self.dec = Decoder(config)
        # Not part of the state dict of the released tokenizer.
        for name, values in (("mean", config.pixel_mean), ("std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(values, dtype=DTYPE).view(3, 1, 1), persistent=False)

    def _encode(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        factor = 2**self.config.stages
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images must have height and width divisible by {factor}, got {list(images.shape)}; "
                "resize or crop them"
            )
        return self.enc_b((images - self.mean) / self.std).permute(0, 2, 3, 1)

    def _decode(self, quantized: Tensor) -> Tensor:
        return self.dec(quantized.permute(0, 3, 1, 2)) * self.std + self.mean

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantise with a straight-through gradient, decode; in training, update the book."""
        z = self._encode(images)
        codes = self.quantize_t.nearest(z)
        quantized = self.quantize_t.lookup(codes)
        commitment = F.mse_loss(z, quantized.detach())
        if self.training:
            self.quantize_t.update(z.detach(), codes)
        straight_through = z + (quantized - z).detach()
        return Reconstruction(self._decode(straight_through), codes, commitment)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to codes ``[B, h, w]``, int64 in ``[0, num_codes)``."""
        return self.quantize_t.nearest(self._encode(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, h, w]`` to images ``[B, 3, H, W]`` clamped to [0, 1]."""
        if codes.dim() != 3:
            raise ValueError(f"codes must be [B, h, w], got {list(codes.shape)}")
        return self._decode(self.quantize_t.lookup(codes)).clamp(0, 1)
