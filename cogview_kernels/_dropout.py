# SPDX-License-Identifier: Apache-2.0
"""Dropout: the arithmetic on its probability, and the counter-based generator behind it.

Every backend draws one mask from one seed.

Per row, ``(r0, r1) = philox4x32-10(key=seed, counter=(c0, c1, c2, 0))``: the counter names the row (for
attention: query, head, sample). Per element, with the key position or column ``j``::

    x = j ^ r0;  x = (x ^ x >> 16) * 0x7FEB352D;  x = x ^ r1
    x = (x ^ x >> 15) * 0x846CA68B;  word = x ^ x >> 16            (all mod 2^32)

An element is kept where ``word >= keep_threshold``, with ``keep_threshold = round(p * 2^32)``. Rows cost ten
rounds once; an element costs two multiplications, whether keys come in order or gathered.
Philox: Salmon et al., SC 2011.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cogview_kernels import _device

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


def keep_mask(dropout: Dropout, rows: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """True where an element survives; ``rows`` are philox words, broadcast against ``columns``."""
    r0, r1 = rows
    x = (columns.long() ^ r0) & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = x ^ r1
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    x = x ^ (x >> 16)
    return x >= dropout.keep_threshold


@dataclass(frozen=True)
class Dropout:
    """Elements are dropped with probability ``p`` in (0, 1), the others multiplied by ``keep_scale``.

    ``seed`` is a 0-d int64 tensor, on the CPU or, where reading it would make the host wait, on the device.
    """

    p: float
    seed: Tensor

    @staticmethod
    def of(p: float, seed: Tensor | None) -> Dropout | None:
        """From the flat arguments of an op; None where nothing is dropped."""
        return None if seed is None or p == 0 else Dropout(p, seed)

    @property
    def keep_threshold(self) -> int:
        """An element whose 32-bit word is below is dropped."""
        return min(round(self.p * 2**32), 2**32 - 1)

    @property
    def keep_scale(self) -> float:
        return 1 / (1 - self.p)

    def words(self, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, Tensor]:
        """The philox words of rows on the device of the counters, see :func:`philox`."""
        return philox(self.seed.to(c0.device), c0, c1, c2)


def native_arguments(dropout: Dropout | None) -> tuple[int, float, int, int]:
    """For compiled code: keep_threshold, keep_scale, seed, and the address of a seed that lies on a GPU."""
    if dropout is None:
        return 0, 1.0, 0, 0
    if dropout.seed.is_cuda:
        return dropout.keep_threshold, dropout.keep_scale, 0, dropout.seed.data_ptr()
    return dropout.keep_threshold, dropout.keep_scale, int(dropout.seed) % 2**64, 0


def for_signature(seed: int | Tensor | None) -> int | Tensor | None:
    """What the signature of a call has of its seed, see ``_backends.signature``.

    Every int that is a seed passes the checks as 0 does: a program that counts its seeds up is checked once.
    """
    return 0 if type(seed) is int and -(2**63) <= seed < 2**64 else seed


def as_seed(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The seed as a 0-d int64 tensor, or None where nothing is dropped. Without a given one, a seed is drawn.

    It is drawn from PyTorch's default generator of the CPU: that costs no device synchronisation, and
    activation checkpointing replays it. A CUDA graph would keep that number for all its replays; while one is
    captured on ``device``, the generator of the device draws, which goes on with each replay.
    """
    if dropout_p == 0:
        return None
    if seed is None:
        captures = not torch.compiler.is_compiling() and _device.is_capturing(device)
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device if captures else "cpu")
    if isinstance(seed, Tensor):
        return seed
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")
