# SPDX-License-Identifier: Apache-2.0
"""The counter-based generator behind every dropout, so that all backends draw one mask from one seed.

Per row, ``(r0, r1) = philox4x32-10(key=seed, counter=(c0, c1, c2, 0))``: the counter names the row (for
attention: query, head, sample). Per element, with the key position or column ``j``::

    x = j ^ r0;  x = (x ^ x >> 16) * 0x7FEB352D;  x = x ^ r1
    x = (x ^ x >> 15) * 0x846CA68B;  word = x ^ x >> 16            (all mod 2^32)

An element is kept where ``word >= round(p * 2^32)``. Rows cost ten rounds once; an element costs two
multiplications, whether keys come in order or gathered. Philox: Salmon et al., SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # b < 2^32 in int64. a * b may pass 2^63 and wrap, which leaves the low half right; the high half
    # is put together from 16-bit pieces.
    low = (a * b) & _MASK32
    a_hi, a_lo = a >> 16, a & 0xFFFF
    b_hi, b_lo = b >> 16, b & 0xFFFF
    mid = a_hi * b_lo + ((a_lo * b_lo) >> 16)
    high = a_hi * b_hi + (mid >> 16) + (((mid & 0xFFFF) + a_lo * b_hi) >> 16)
    return high & _MASK32, low


def philox(seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words of Philox4x32-10 as int64 tensors in [0, 2^32); counters broadcast."""
    x0, x1, x2 = torch.broadcast_tensors(c0.long(), c1.long(), c2.long())
    x3 = torch.zeros_like(x0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        h0, l0 = _mulhilo(_PHILOX_M[0], x0)
        h1, l1 = _mulhilo(_PHILOX_M[1], x2)
        x0, x1, x2, x3 = h1 ^ x1 ^ k0, l1, h0 ^ x3 ^ k1, l0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return x0, x1


def keep_mask(p: float, rows: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """True where an element survives dropout; ``rows`` are philox words, broadcast against ``columns``."""
    r0, r1 = rows
    x = (columns.long() ^ r0) & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = x ^ r1
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    x = x ^ (x >> 16)
    return x >= round(p * 2**32)


def as_seed(seed: int | Tensor | None) -> Tensor:
    """A 0-d int64 tensor: the given seed, or one drawn from PyTorch's default CPU generator.

    Drawing there costs no device synchronisation, and activation checkpointing replays it.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        return seed
    return torch.tensor(seed, dtype=torch.int64)
