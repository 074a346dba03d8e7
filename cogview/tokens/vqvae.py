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

from cogview.config import CodebookMethod, ImageTokenizerConfig

DTYPE = torch.float32  # of new weights, whatever PyTorch's default is; ``tokenizer.to(dtype)`` for another

# Distances that are held at a time while the nearest codes are looked for. More of them than a CPU's caches
# hold would come from memory three times over; a GPU wants few launches.
DISTANCES_ON_CPU, DISTANCES = 1 << 20, 1 << 26

CHROMA = 2.5  # by how much ``stretched_hues`` moves a colour from its grey


def count_used(codes: Tensor, num_codes: int) -> Tensor:
    """How many of the ``num_codes`` codes there are stand in ``codes``: a tensor, which nothing waits for."""
    return torch.zeros(num_codes, device=codes.device, dtype=DTYPE).index_fill_(0, codes.flatten(), 1.0).sum()


def stretched_hues() -> Tensor:
    """A symmetric map of RGB, ``[3, 3]``: greys stay, and other colours move away from their grey.

    Plain RGB makes little of hues: OpenMoji's light skin (#fadcbc) is as far from its light grey (#d0cfce) as
    two greys that differ by 27 of 255. Under this map it is as far as two greys that differ by 62.
    """
    grey = torch.full((3, 3), 1 / 3, dtype=DTYPE)
    return grey + CHROMA * (torch.eye(3, dtype=DTYPE) - grey)


class ResidualBlock(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))``, the block of the first VQ-VAE (arXiv:1711.00937).

    It begins as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = nn.Conv2d(channels, channels, 3, padding=1, dtype=DTYPE)
        last = nn.Conv2d(channels, channels, 1, dtype=DTYPE)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.blocks = nn.Sequential(nn.ReLU(), inner, nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


class Encoder(nn.Module):
    """To the code grid by ``stages`` stride-2 convolutions with ReLU, or by one convolution of its cells.

    Residual blocks follow, if there are any, and a 1x1 convolution to the code size.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        if config.patches:
            cell = 2**config.stages
            layers.append(nn.Conv2d(channels, config.channels, cell, stride=cell, dtype=DTYPE))
            channels = config.channels
        else:
            for _ in range(config.stages):
                layers += [
                    nn.Conv2d(channels, config.channels, 4, stride=2, padding=1, dtype=DTYPE),
                    nn.ReLU(),
                ]
                channels = config.channels
        layers += [ResidualBlock(channels) for _ in range(config.residual_blocks)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(channels, config.code_dim, 1, dtype=DTYPE))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


class Decoder(nn.Module):
    """Mirror of the encoder; a 3x3 convolution leads to the residual blocks, if there are any."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.code_dim
        if config.residual_blocks:
            layers.append(nn.Conv2d(channels, config.channels, 3, padding=1, dtype=DTYPE))
            channels = config.channels
            layers += [ResidualBlock(channels) for _ in range(config.residual_blocks)]
        if config.patches:
            cell = 2**config.stages
            layers.append(nn.ConvTranspose2d(channels, 3, cell, stride=cell, dtype=DTYPE))
        else:
            for _ in range(config.stages):
                layers += [
                    nn.ConvTranspose2d(channels, config.channels, 4, stride=2, padding=1, dtype=DTYPE),
                    nn.ReLU(),
                ]
                channels = config.channels
            layers.append(nn.Conv2d(channels, 3, 1, dtype=DTYPE))
        self.blocks = nn.Sequential(*layers)

    def forward(self, codes: Tensor) -> Tensor:
        return self.blocks(codes)


class Quantized(NamedTuple):
    """Vectors that were replaced by codes, and the losses that belong to it."""

    vectors: Tensor  # [..., D], the codes' vectors, with a gradient for what they stand for
    codes: Tensor  # [...] int64
    commitment: Tensor  # mean squared distance from the vectors to their (fixed) codes
    codebook: Tensor  # the same distance, to draw the codes; 0 where the book learns otherwise or not at all


class Quantizer(nn.Module):
    """Nearest code by squared distance, and the four ways of the paper (section 2.2) to learn the book.

    - ``"moving-average"``: the book follows the encoder by moving averages. A code that on average serves
      fewer than ``revive_below`` vectors a step, and less than a 16th of an even share of them, restarts at
      a random encoder output; in the first step that is nearly all of them. Without it most of a small book
      is never used.
    - ``"straight-through"``: a loss of its own draws each code to its vectors (arXiv:1711.00937).
    - ``"gumbel"``: in training, codes are drawn with probability softmax(-distance / temperature) by
      Gumbel's trick, and the gradient is that of the softmax. The trainer lowers ``temperature``.
    - ``"fixed"``: the book stays what it was at initialisation, and the encoder learns to meet it.

    ``embed`` is stored transposed, ``[D, K]``. All ways give the same tensors, and drawing, captioning and
    ``encode`` take the nearest code.
    """

    decay = 0.99
    eps = 1e-5
    revive_below = 0.5

    method: CodebookMethod = "moving-average"
    temperature = 1.0

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        embed = torch.empty(config.code_dim, config.num_codes, dtype=DTYPE)
        nn.init.xavier_uniform_(embed, gain=nn.init.calculate_gain("tanh"))
        # Without a gradient, unless the way to learn it is by gradient.
        self._keep(nn.Parameter(embed, requires_grad=False))
        self.register_buffer("cluster_size", torch.zeros(config.num_codes, dtype=DTYPE))
        self.register_buffer("embed_avg", self.embed.detach().clone())

    def _keep(self, embed: nn.Parameter) -> None:
        """Where the book is stored."""
        self.embed: Tensor = embed

    def learn_by(self, method: CodebookMethod) -> None:
        """How training changes the book from now on."""
        self.method = method
        for book in self.parameters():
            book.requires_grad_(method in ("straight-through", "gumbel"))

    @torch.no_grad()
    def begin_at(self, z: Tensor) -> None:
        """Start the book at random ones of the vectors ``[..., D]``, at no two that are equal if it can.

        White paper alone may be half of all vectors.
        """
        distinct = torch.unique(z.reshape(-1, z.shape[-1]), dim=0)
        num_codes = self.embed.shape[1]
        order = torch.randperm(len(distinct), device=z.device)
        chosen = distinct[order[torch.arange(num_codes, device=z.device) % len(distinct)]].t()
        self.embed.copy_(chosen)
        self.embed_avg.copy_(chosen)
        self.cluster_size.fill_(1.0)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise ``[..., D]`` vectors; in training, let the book learn."""
        if self.method == "gumbel" and self.training:
            return self._drawn(z)
        codes = self.nearest(z)
        quantized = self.lookup(codes)
        commitment = F.mse_loss(z, quantized.detach())
        codebook = torch.zeros_like(commitment)
        if self.training and self.method == "moving-average":
            self.update(z.detach(), codes)
        if self.training and self.method == "straight-through":
            codebook = F.mse_loss(quantized, z.detach())
        return Quantized(z + (quantized - z).detach(), codes, commitment, codebook)

    def _drawn(self, z: Tensor) -> Quantized:
        logits = -self.distances(z.reshape(-1, z.shape[-1])) / self.temperature
        chosen = F.gumbel_softmax(logits, hard=True)
        nothing = torch.zeros((), dtype=z.dtype, device=z.device)
        codes = chosen.detach().argmax(1).view(z.shape[:-1])
        return Quantized((chosen @ self.embed.t()).view_as(z), codes, nothing, nothing)

    def distances(self, flat: Tensor) -> Tensor:
        """Squared distances ``[N, K]`` of vectors ``[N, D]`` from all codes, less the vectors' own squares.

        These are the same for every code, so they change neither the nearest one nor a softmax.
        """
        return torch.addmm(self.embed.square().sum(0), flat, self.embed, alpha=-2)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code for each ``[..., D]`` vector; int64 ``[...]``."""
        flat = z.reshape(-1, z.shape[-1])
        held = DISTANCES_ON_CPU if z.device.type == "cpu" else DISTANCES
        together = max(1, held // self.embed.shape[1])
        # Not argmin, which takes longer than min on a CPU.
        parts = [self.distances(part).min(1).indices for part in flat.split(together)]
        return torch.cat(parts).view(z.shape[:-1])

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

        dead = self.cluster_size < min(self.revive_below, len(z) / (16 * num_codes))
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
    commitment: Tensor  # as in Quantized
    codebook: Tensor  # as in Quantized


class ImageTokenizer(nn.Module):
    """Images in [0, 1] to code grids and back.

    Fully convolutional: any height and width divisible by ``2**stages`` work.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self._make_parts(config)
        # Not part of the state dict of the released tokenizer.
        for name, values in (("mean", config.pixel_mean), ("std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(values, dtype=DTYPE).view(3, 1, 1), persistent=False)

    def _make_parts(self, config: ImageTokenizerConfig) -> None:
        """The modules, under the names that the released weights have."""
        self.enc_b = Encoder(config)
        self.quantize_t = Quantizer(config)
        self.dec = Decoder(config)

    @property
    def quantizer(self) -> Quantizer:
        """The codebook."""
        return self.quantize_t

    @torch.no_grad()
    def begin_with_patches(self, color_weight: float = 0.0) -> None:
        """Let a code's vector be its cell's pixels, turned, and the decoder turn them back.

        Encoder and decoder are the identity then, as far as ``channels`` and ``code_dim`` have room for the
        pixels: training has to learn only what a codebook loses. A squared distance between vectors is the
        sum of the pixels' squared errors and, for each of them, ``color_weight`` times that of the mean
        colour under :func:`stretched_hues`, so the nearest code is the one of least loss. For a new tokenizer
        with ``config.patches``.
        """
        first, last = self.enc_b.blocks[0], self.enc_b.blocks[-1]
        back, out = self.dec.blocks[0], self.dec.blocks[-1]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        assert isinstance(back, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(out, nn.ConvTranspose2d)
        for layer in (first, last, back, out):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(first.weight)
        nn.init.orthogonal_(last.weight)
        from_cell = first.weight.flatten(1)  # [channels, pixels of a cell]
        to_code = from_code = last.weight.flatten(1)  # [code_dim, channels]
        pixels = from_cell.shape[1]
        if len(to_code) >= pixels:
            turn = nn.init.orthogonal_(torch.empty(len(to_code), pixels, dtype=DTYPE))
            mean = torch.full((pixels // 3, pixels // 3), 3 / pixels, dtype=DTYPE)
            hues = stretched_hues()
            metric = torch.eye(pixels, dtype=DTYPE) + color_weight * torch.kron(hues @ hues, mean)
            squares, axes = torch.linalg.eigh(metric.double())
            root = (axes * squares.sqrt()) @ axes.t()
            to_code = turn @ root.to(turn) @ from_cell.t()
            from_code = turn @ root.inverse().to(turn) @ from_cell.t()
            last.weight.copy_(to_code.view_as(last.weight))
        if back is out:
            out.weight.copy_((from_code @ from_cell).view_as(out.weight))
        else:
            back.weight.zero_()
            back.weight[:, :, 1, 1] = from_code.t()
            out.weight.copy_(first.weight)

    def vectors(self, images: Tensor) -> Tensor:
        """What the encoder makes of images ``[B, 3, H, W]``, before it is quantised: ``[B, h, w, D]``."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        factor = 2**self.config.stages
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images must have height and width divisible by {factor}, got {list(images.shape)}; "
                "resize or crop them"
            )
        return self._encoder((images - self.mean) / self.std).permute(0, 2, 3, 1)

    def rebuild(self, quantized: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``, not clamped, of codes' vectors ``[B, h, w, D]``."""
        return self._decoder(quantized.permute(0, 3, 1, 2)) * self.std + self.mean

    def _encoder(self, images: Tensor) -> Tensor:
        return self.enc_b(images)

    def _decoder(self, quantized: Tensor) -> Tensor:
        return self.dec(quantized)

    def forward(self, images: Tensor, *, quantise: bool = True) -> Reconstruction:
        """Encode, quantise, decode; in training, the book learns as :class:`Quantizer` was told.

        Without ``quantise``, what is decoded are the vectors themselves, and the book stays as it is.
        """
        z = self.vectors(images)
        # Near codes differ by less than 16 bits tell apart, so under autocast this stays in float32.
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.mean.dtype)
            if quantise:
                quantized = self.quantizer(z)
            else:
                nothing = torch.zeros((), dtype=z.dtype, device=z.device)
                quantized = Quantized(z, self.quantizer.nearest(z), nothing, nothing)
        decoded = self.rebuild(quantized.vectors)
        return Reconstruction(decoded, quantized.codes, quantized.commitment, quantized.codebook)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [0, 1] to codes ``[B, h, w]``, int64 in ``[0, num_codes)``."""
        return self.quantizer.nearest(self.vectors(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, h, w]`` to images ``[B, 3, H, W]`` clamped to [0, 1]."""
        if codes.dim() != 3:
            raise ValueError(f"codes must be [B, h, w], got {list(codes.shape)}")
        return self.rebuild(self.quantizer.lookup(codes)).clamp(0, 1)
