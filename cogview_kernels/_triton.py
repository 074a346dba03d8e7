# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels of several ops share. Imported only once a Triton kernel is to run."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from cogview_kernels import _backends
from cogview_kernels._dropout import Dropout

# The interpreter's bfloat16 arithmetic is silently wrong, so there every operand is widened right after
# its load; on a GPU the matrix units take 16-bit operands as they are.
INTERPRETED = _backends.TRITON_INTERPRETED
_WIDEN = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def offset(index, stride):
    """``index * stride`` in 64 bits; every offset that can pass 2^31 goes through here.

    ``index`` has 32 bits, and is negative under a mask alone: unsigned, it costs half the instructions."""
    return tl.cast(tl.cast(index, tl.uint32), tl.int64) * stride


@triton.jit
def load_rows(base_ptr, rows, stride, seen, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]`` from rows of D contiguous elements; 0 where not ``seen`` and past D.

    16-bit operands of a matrix product stay as they are, but for the interpreter, which gets float32."""
    d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + offset(rows, stride)[:, None] + d[None, :]
    if D == BLOCK_D:
        x = tl.load(pointers, mask=seen[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    if _WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Float32 rounded to the nearest value of ``dtype``, as float32 still.

    The interpreter's own conversion would truncate to bf16."""
    if dtype == tl.bfloat16 and _WIDEN:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, rounded, bits | 0x400000)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype).to(tl.float32)


@triton.jit
def store_rounded(pointer, value, mask, dtype: tl.constexpr):
    """Store float32 as ``dtype``, to nearest even."""
    tl.store(pointer, round_to(value, dtype).to(dtype), mask=mask)


@triton.jit
def dropout_rows(seed, c0, c1, c2):
    """The two words of a row for :func:`dropout_keeps`: Philox4x32-10 of (c0, c1, c2, 0), see ``_dropout``,
    each already xored with itself shifted, as :func:`dropout_keeps` would for every element.

    ``seed`` is an integer or a pointer to one; ``c0`` an int32 tensor, the others int32 scalars."""
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    r0, r1, _, _ = tl.philox(seed, c0, c1, c2, tl.zeros_like(c2))
    return r0 ^ (r0 >> 16), r1 ^ (r1 >> 15)


@triton.jit
def dropout_keeps(r0, r1, columns, keep_threshold):
    """True where an element survives; words of rows (uint32) and columns broadcast against each other."""
    c = columns.to(tl.uint32)
    # A shift of (c ^ r0) is that of c and that of r0: two steps an element fewer, the same bits.
    x = (c ^ (c >> 16) ^ r0) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ r1) * 0x846CA68B
    keep_threshold = keep_threshold.to(tl.uint32)
    # As (x ^ (x >> 16)) >= keep_threshold: the upper halves decide, or they are equal, and then x >> 16 is
    # keep_threshold >> 16.
    return (x ^ (keep_threshold >> 16)) >= keep_threshold


def dropout_arguments(dropout: Dropout | None) -> tuple[Any, int, float]:
    """Seed (a number, or a pointer where it lies on a GPU), keep_threshold and keep_scale."""
    if dropout is None:
        return 0, 0, 1.0
    seed = dropout.seed if dropout.seed.is_cuda else int(dropout.seed)
    return seed, dropout.keep_threshold, dropout.keep_scale
