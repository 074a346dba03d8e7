# SPDX-License-Identifier: Apache-2.0
"""Three-region attention by plain Python loops, from the two-line rule alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def regions(
    pivots: list[int], block_size: int, window_blocks: int, query: int, keys: int | None = None
) -> tuple[list[int], list[int]]:
    """``(window, far)``: the key positions that ``query`` sees in each region.

    ``keys``: how many there are, where it also sees those after itself."""
    window, far = [], []
    for key in range(query + 1 if keys is None else keys):
        if abs(key // block_size - query // block_size) < window_blocks:
            window.append(key)
        elif key in pivots:
            far.append(key)
    return window, far


def brute_force_mask(
    pivots: Tensor, block_size: int, window_blocks: int, T: int, causal: bool = True
) -> Tensor:
    mask = torch.zeros(pivots.shape[0], T, T, dtype=torch.bool)
    for b, sample in enumerate(pivots.tolist()):
        for query in range(T):
            for part in regions(sample, block_size, window_blocks, query, None if causal else T):
                mask[b, query, part] = True
    return mask


def survives(p: float, seed: int, sample: int, head: int, query: int, key: int) -> bool:
    """The dropout of ``cogview_kernels._dropout`` with Python's integers."""
    x = [query, head, sample, 0]
    k = [seed & MASK32, seed >> 32 & MASK32]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b & MASK32, a >> 32 ^ x[3] ^ k[1], a & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    word = key ^ x[0]
    word = (word ^ word >> 16) * 0x7FEB352D & MASK32
    word ^= x[1]
    word = (word ^ word >> 15) * 0x846CA68B & MASK32
    return word ^ word >> 16 >= round(p * 2**32)


def brute_force_attention(
    q: Tensor, k: Tensor, v: Tensor, layout, scale: float, dropout_p: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, one query at a time."""
    B, H, T, _ = q.shape
    G = H // k.shape[1]
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    for b in range(B):
        for i in range(T):
            sizes = layout.block_size, layout.window_blocks
            window, far = regions(layout.pivots[b].tolist(), *sizes, i, None if layout.causal else T)
            for h in range(H):
                logits = [scale * float(q[b, h, i] @ k[b, h // G, j]) for j in window]
                logits += [scale * float(q[b, h, i] @ k[b, h // G, j]) + layout.pivot_bias for j in far]
                peak = max(logits)
                total = sum(math.exp(x - peak) for x in logits)
                lse[b, h, i] = peak + math.log(total)
                row = torch.zeros_like(q[b, h, i])
                for j, x in zip(window + far, logits, strict=True):
                    if dropout_p == 0 or survives(dropout_p, seed, b, h, i, j):
                        row += math.exp(x - peak) / total / (1 - dropout_p) * v[b, h // G, j]
                out[b, h, i] = row
    return out, lse
