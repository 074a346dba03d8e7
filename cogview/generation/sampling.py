# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: pure functions, each working row by row on ``[..., V]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview.config import SamplingConfig


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
    """Probabilities after temperature, top-k and top-p, in this order; float32."""
    logits = logits.float() / config.temperature
    return top_p_filter(top_k_filter(logits, config.top_k), config.top_p).softmax(-1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One index per row by inverting the cumulative distribution at ``uniform`` (``[...]`` in [0, 1)).

    A multinomial draw whose randomness comes from outside, so that a row's outcome depends on its own
    seed and not on what else is in the batch. An index of probability zero is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    # Scaling by the last sum keeps the target below it, whatever the rounding.
    target = uniform.double()[..., None] * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, target, right=True)[..., 0]
    last = (probabilities > 0).long().cumsum(-1).argmax(-1)  # last index with probability above zero
    return torch.minimum(index, last)


def row_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """float32 ``[len(seeds), steps]`` uniform numbers in [0, 1), each row from its own seed."""
    generator = torch.Generator()
    rows = [torch.rand(steps, generator=generator.manual_seed(seed), dtype=torch.float32) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, steps, dtype=torch.float32)
