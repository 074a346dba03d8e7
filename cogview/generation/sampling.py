# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: pure functions, each working row by row on ``[..., V]``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cogview.config import SamplingConfig
from cogview_kernels import _draw

MADE_AT_ONCE = 1 << 22  # numbers of noise, 16 MiB
COLDEST = 1e-6  # a temperature below it is taken for 0: in float32 it leaves one token anyway


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Logits below the k-th largest of their row become -inf; ties with it stay. 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Keep each row's most probable tokens until they reach probability ``p``; 0 or 1 keeps all.

    The token that crosses ``p`` stays, so at least one always does.
    """
    if p <= 0 or p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(removed, -torch.inf)


def token_probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Probabilities after temperature (above 0), top-k and top-p, in this order; float32."""
    logits = logits.float()
    if config.temperature != 1:  # softmax subtracts the maximum itself
        logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    return top_p_filter(top_k_filter(logits, config.top_k), config.top_p).softmax(-1)


def choose(
    logits: Tensor, config: SamplingConfig, noise: Noise, positions: Tensor, total: Tensor | None = None
) -> Tensor:
    """One index per row of ``[B, T, V]``: the likeliest at temperature 0, else drawn; int64 ``[B, T]``.

    The sum of the logits is added to ``total``, which is not finite if one of them is not.
    """
    drawing = drawing_of(config, noise, total)
    if drawing is not None and _draw.can_draw(logits):
        return _draw.draw_tokens(logits, positions, drawing)
    if total is not None:
        total += logits.sum(dtype=torch.float32)  # two ops, where isfinite().all() are eight
    if config.temperature < COLDEST:
        return logits.argmax(-1)
    return draw(token_probabilities(logits, config), noise.at(positions))


def drawing_of(config: SamplingConfig, noise: Noise, total: Tensor | None) -> _draw.Drawing | None:
    """The same for the kernel, which has no top-p."""
    if 0 < config.top_p < 1:
        return None
    temperature = config.temperature if config.temperature >= COLDEST else 0.0
    return _draw.Drawing(noise.seeds, noise.first, temperature, min(config.top_k, noise.size), total)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """One index per row: the first to arrive where index i arrives at rate ``probabilities[..., i]``.

    With ``noise`` from :func:`exponentials` index i has exactly the probability i. An index of
    probability zero is never drawn. A small change of the probabilities seldom changes the outcome: the
    chance is at most twice what the two distributions differ by (total variation), in any order of indices.
    """
    return (probabilities / noise).argmax(-1)


# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), in int64, whose
# products wrap as unsigned ones do.
_GAMMA, _FIRST, _SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def exponentials(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Exponential noise, float32 ``[B, T, size]``: a pure function of seed, position and index.

    So what is drawn at a position depends neither on the rest of the batch nor on how many positions are
    drawn at a time, and nothing waits for the device.
    """
    state = _mixed(seeds[:, None] + positions * _GAMMA)
    index = torch.arange(1, size + 1, device=seeds.device) * _GAMMA
    bits = _shift(_mixed(state[..., None] + index), 33)
    # At 1 the noise would be infinite, which no index could win against, not even the only one left.
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-uniform)


class Noise:
    """:func:`exponentials` of B rows at ``length`` positions: made at once where that is little memory.

    Args:
        seeds: int64 ``[B]``.
        size: indices that there are to choose among.
        first: the position that is called 0 here.
    """

    def __init__(self, seeds: Tensor, length: int, size: int, first: int = 0) -> None:
        self.seeds, self.length, self.size, self.first = seeds, length, size, first

    @functools.cached_property
    def made(self) -> Tensor | None:
        """Of all positions; None where that would be much memory. A kernel that draws needs none of it."""
        if len(self.seeds) * self.length * self.size > MADE_AT_ONCE:
            return None
        positions = torch.arange(self.first, self.first + self.length, device=self.seeds.device)
        return exponentials(self.seeds, positions.expand(len(self.seeds), -1), self.size)

    def at(self, positions: Tensor) -> Tensor:
        """float32 ``[B, T, size]`` at positions ``[B, T]``."""
        if self.made is None:
            return exponentials(self.seeds, positions + self.first, self.size)
        return self.made.gather(1, positions.unsqueeze(-1).expand(-1, -1, self.size))
