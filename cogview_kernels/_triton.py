# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels of several ops share. Imported only once a Triton kernel is to run."""

from __future__ import annotations

import triton
import triton.language as tl

from cogview_kernels import _backends

# The interpreter's bfloat16 arithmetic is silently wrong, so there every operand is widened right after
# its load; on a GPU the matrix units take 16-bit operands as they are.
INTERPRETED = _backends.TRITON_INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def offset(index, stride):
    """``index * stride`` in 64 bits; every offset that can pass 2^31 goes through here."""
    return index.to(tl.int64) * stride


@triton.jit
def store_rounded(pointer, value, mask, dtype: tl.constexpr):
    """Store float32 as ``dtype``, to nearest even (the interpreter alone would truncate to bf16)."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = tl.where(value == value, rounded, bits | 0x400000)
        value = bits.to(tl.float32, bitcast=True)
    tl.store(pointer, value.to(dtype), mask=mask)
